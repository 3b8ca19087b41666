// The daemon's parts, in the order in which they start: each finds what it needs in place. They end
// in the opposite order, and metrics are rendered in this one.
#include "daemon/parts.h"

#include "daemon/core/device.h"
#include "daemon/core/lifecycle.h"
#include "daemon/core/process.h"
#include "daemon/core/reload.h"
#include "daemon/core/signals.h"
#include "daemon/rpc/locks.h"
#include "daemon/rpc/rpc.h"
#include "daemon/rpc/users.h"
#include "daemon/sched/exec.h"
#include "daemon/sched/fences.h"
#include "daemon/sched/queue.h"
#include "daemon/sched/work.h"
#include "daemon/service/events.h"
#include "daemon/service/health.h"
#include "daemon/service/http.h"
#include "daemon/service/rotations.h"
#include "daemon/session/buffer.h"
#include "daemon/session/fdsock.h"
#include "daemon/session/memory.h"
#include "daemon/session/pool.h"
#include "daemon/session/session.h"
#include "daemon/session/tenants.h"

const struct kvd_part *const kvd_parts[] = {
    &kvd_part_signals,
    &kvd_part_users,
    &kvd_part_device,
    &kvd_part_memory,
    &kvd_part_buffers,
    &kvd_part_pool,
    &kvd_part_tenants,
    &kvd_part_sessions,
    &kvd_part_queue,
    &kvd_part_fences,
    &kvd_part_works,
    &kvd_part_exec,
    &kvd_part_locks, // before anything listens
    &kvd_part_rpc,
    &kvd_part_fdsock,
    &kvd_part_rotations,
    &kvd_part_events,
    &kvd_part_health,
    &kvd_part_http,
    &kvd_part_reload,
    &kvd_part_lifecycle,
    &kvd_part_process,
    NULL,
};
