"""What every inference engine's connector needs, whichever engine it is: what decides about keys and values (`space`), which pages stay
exact (`policy`), a page store that turns every failure into a miss (`PageStore`), and queues that keep it out of the engine's way
(`Transfers`, `Lookups`)."""
from ._breaker import Breaker
from ._lookups import Finding, Lookups
from ._policy import COMPRESSED, EXACT, MISSING, PAGE, Policy, split_key
from ._space import Adapters, Refused, space, weights_digest
from ._store import Counters, PageStore, Ranks, registered, restore_seconds
from ._tails import Tails
from ._transfers import Done, Transfers

__all__ = ["Adapters", "Breaker", "COMPRESSED", "Counters", "Done", "EXACT", "Finding", "Lookups", "MISSING", "PAGE", "PageStore", "Policy",
           "Ranks", "Refused", "Tails", "Transfers", "registered", "restore_seconds", "space", "split_key", "weights_digest"]
