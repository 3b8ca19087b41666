#!/usr/bin/env bash
# Folders may include only what lies below them: see README.md, "The parts".
set -u
cd "$(dirname "$0")/.."
bad=0
rule() { # rule FOLDER ALLOWED...
    local folder=$1 line file header top
    shift
    while IFS= read -r line; do
        file=${line%%:*}
        header=$(sed -E 's/.*#include "([^"]+)".*/\1/' <<<"$line")
        top=${header%%/*}
        case "$top" in proto | pool | kernels | calib | daemon | client | tests) ;; *) continue ;; esac
        case " $folder $* " in
        *" $top "*) ;;
        *)
            echo "$file includes $header: $folder may include only: $*"
            bad=1
            ;;
        esac
    done < <(grep -rnE '#include "' "$folder" --include='*.[ch]' --include='*.cu' --include='*.cuh' 2>/dev/null)
}
rule proto
rule pool proto
rule kernels proto
rule calib kernels proto
rule daemon calib kernels pool proto
rule client/kvctl client calib proto
# The rooms of the daemon: each may include itself and those before it. main.c and parts.c know all.
rooms=(core tier rpc session sched service)
below=
for room in "${rooms[@]}"; do
    below+=" $room"
    while IFS=: read -r file _ header; do
        case " $below " in
        *" $(cut -d/ -f2 <<<"$header") "*) ;;
        *)
            echo "$file includes $header: daemon/$room may include only:$below"
            bad=1
            ;;
        esac
    done < <(grep -rnoE '"daemon/[^"]+"' "daemon/$room" --include='*.[ch]' | tr -d '"')
done
stray=$(find daemon -name '*.[ch]' | grep -vE "^daemon/($(IFS='|'; echo "${rooms[*]}"))/|^daemon/(main|parts)\.[ch]$")
[ -z "$stray" ] || { echo "in no room of the daemon: $stray"; bad=1; }
# The library itself: no daemon, no pool, no calib.
while IFS= read -r f; do
    grep -nE '#include "(daemon|pool|calib)/' "$f" && { echo "$f includes what libkvd may not"; bad=1; }
done < <(find client/lib -name '*.[ch]')
# The public headers stand alone.
if grep -n '#include "' client/include/kvd/*.h; then
    echo "a public header includes a private one"
    bad=1
fi
grep -rnE '#include "(daemon|pool|kernels|calib|proto|client)/' client/examples tests/e2e --include='*.c' && { echo "examples use libkvd as installed"; bad=1; }
exit $bad
