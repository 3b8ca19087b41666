// The daemon's parts, in the order in which they start: each finds what it needs in place. They end
// in the opposite order, and metrics are rendered in this one.
#include "daemon/parts.h"

#include "daemon/core/closer.h"
#include "daemon/core/comeback.h"
#include "daemon/core/device.h"
#include "daemon/core/keep.h"
#include "daemon/core/lifecycle.h"
#include "daemon/core/piecework.h"
#include "daemon/core/process.h"
#include "daemon/core/reload.h"
#include "daemon/core/signals.h"
#include "daemon/rpc/locks.h"
#include "daemon/rpc/rpc.h"
#include "daemon/rpc/users.h"
#include "daemon/sched/exec.h"
#include "daemon/sched/fences.h"
#include "daemon/sched/page_counts.h"
#include "daemon/sched/superseded.h"
#include "daemon/sched/upload.h"
#include "daemon/sched/work.h"
#include "daemon/service/claims.h"
#include "daemon/service/demote.h"
#include "daemon/service/events.h"
#include "daemon/service/evict.h"
#include "daemon/service/health.h"
#include "daemon/service/hints.h"
#include "daemon/service/http.h"
#include "daemon/service/page.h"
#include "daemon/service/prompts.h"
#include "daemon/service/restore.h"
#include "daemon/service/rotations.h"
#include "daemon/service/steps.h"
#include "daemon/service/waits.h"
#include "daemon/session/buffer.h"
#include "daemon/session/fdsock.h"
#include "daemon/session/leases.h"
#include "daemon/session/memory.h"
#include "daemon/session/pool.h"
#include "daemon/session/room.h"
#include "daemon/session/scrub.h"
#include "daemon/session/session.h"
#include "daemon/session/spare.h"
#include "daemon/session/tenants.h"
#include "daemon/tier/tiers.h"

const struct kvd_part *const kvd_parts[] = {
    &kvd_part_signals,   // SIGTERM, SIGINT, SIGHUP
    &kvd_part_users,     // shares
    &kvd_part_closer,    // closing what workers have sent
    &kvd_part_keep,      // what an earlier kvd has left
    &kvd_part_comeback,  // and what says that there will be a next one
    &kvd_part_device,    // the backend
    &kvd_part_memory,    // extents
    &kvd_part_buffers,   // what the host has room for
    &kvd_part_tiers,     // what is behind the pool
    &kvd_part_pool,      // and the namespaces of the configuration
    &kvd_part_tenants,   // who is charged
    &kvd_part_piecework, // what takes long
    &kvd_part_spare,     // what is kept free
    &kvd_part_room,      // and made for who waits
    &kvd_part_leases,    // of prefixes
    &kvd_part_sessions,  // and their own leases
    &kvd_part_scrub,     // checksums of blocks
    &kvd_part_fences,    // GPU streams of workers
    &kvd_part_works,     // calls, and their line
    &kvd_part_pages,     // their counters
    &kvd_part_exact,     // exact ones that only leases keep
    &kvd_part_exec,      // the executor
    &kvd_part_uploads,   // its jobs that are added to while they run
    &kvd_part_demotion,  // new blocks to tiers
    &kvd_part_restores,  // and back
    &kvd_part_locks,     // before anything listens
    &kvd_part_rpc,       // gRPC
    &kvd_part_fdsock,    // the fd socket
    &kvd_part_rotations, // rotation sets, and their downloads
    &kvd_part_events,    // Watch
    &kvd_part_claims,    // of prompts that somebody computes
    &kvd_part_waits,     // and the memory of those who wait
    &kvd_part_steps,     // calls that are done step by step
    &kvd_part_page,      // of metrics, for who asks
    &kvd_part_prompts,   // prefixes
    &kvd_part_hints,     // about them
    &kvd_part_health,    // grpc.health.v1
    &kvd_part_evict,     // evictions by operators
    &kvd_part_http,      // /metrics, /healthz, /readyz
    &kvd_part_reload,    // of the configuration
    &kvd_part_lifecycle, // draining and uptime
    &kvd_part_process,   // memory, CPU time, descriptors
    NULL,
};
