"""Which pages are kept exact, and how much of what is there is worth loading."""
from __future__ import annotations

import dataclasses
import hashlib

PAGE = 64  # tokens
MISSING, COMPRESSED, EXACT = 0, 1, 2  # of a page


@dataclasses.dataclass(frozen=True)
class Policy:
    """Attention leans on a prompt's first tokens and on its last ones: these are kept in bf16, all others as the codec has them.

    lossy: whether the codec loses anything; if not, no page is exact and none has to be.
    first, last: pages at a chain's beginning and end that are exact.
    """

    lossy: bool = True
    first: int = 1
    last: int = 4

    def exact(self, begin: int, count: int, chain: int) -> bytes:
        """Of the pages [begin, begin + count) of a chain that ends after `chain` pages: 1 where one is exact. Pages behind the chain's
        end, which come by decoding and whose end nobody knows, are compressed."""
        if not self.lossy:
            return bytes(count)
        return bytes(i < self.first or chain - self.last <= i < chain for i in range(begin, begin + count))

    def usable(self, kinds: bytes, begin: int) -> int:
        """How many leading pages to load, when page `begin` and those after it are of these kinds, and none is missing. Where a chain ended, its last pages are exact and all are loaded. Where the
        prompt departs from it earlier, they are compressed; then the last ones are left to the engine, so that the tokens right before
        those that it goes on with are exact there too."""
        n = len(kinds)
        if not self.lossy:
            return n
        for cut in range(n, max(0, n - self.last), -1):
            tail = range(max(begin + cut - self.last, self.first, begin), begin + cut)
            if all(kinds[i - begin] == EXACT for i in tail):
                return cut
        return max(0, n - self.last)


def split_key(key: bytes, pages: int) -> list[bytes]:
    """Keys of the pages of an engine's chunk of several."""
    if pages == 1:
        return [key]
    return [hashlib.sha256(b"kvd part %d of %d " % (i, pages) + key).digest() for i in range(pages)]
