// Admin.Verify: a pass of the scrubber that somebody asks for, and how far it is.
#include "admin.pb-c.h"
#include "daemon/rpc/rpc.h"
#include "daemon/service/handlers.h"
#include "daemon/session/scrub.h"

void kvd_on_verify(struct kvd_call *call, const void *request)
{
    const Kvd__V1__VerifyRequest *req = request;
    if (req->begin)
        kvd_scrub_demand(call->d);
    struct kvd_scrub_state s = kvd_scrub_look(call->d);
    Kvd__V1__VerifyReply r = KVD__V1__VERIFY_REPLY__INIT;
    Kvd__V1__DamagedBlock *blocks KVD_FREE = calloc((size_t)s.n_found + 1, sizeof(*blocks));
    Kvd__V1__DamagedBlock **list KVD_FREE = calloc((size_t)s.n_found + 1, sizeof(*list));
    for (uint32_t i = 0; blocks && list && i < s.n_found; i++) {
        kvd__v1__damaged_block__init(&blocks[i]);
        blocks[i].namespace_name = (char *)s.found[i].ns;
        blocks[i].sequence = s.found[i].sequence;
        blocks[i].name = (char *)s.found[i].name;
        blocks[i].plane = s.found[i].plane;
        blocks[i].block = s.found[i].block;
        list[i] = &blocks[i];
        r.n_found = i + 1;
    }
    r.found = list;
    r.running = s.demanded;
    r.passes = s.demanded_passes;
    r.checked = s.checked;
    r.blocks = s.total;
    r.damaged = s.damaged;
    kvd_call_reply(call, &r);
}
