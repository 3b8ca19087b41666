// An engine's memory that kvd has mapped, of calls that name pages in it. Any thread.
#ifndef KVD_CLIENT_REGISTERED_H
#define KVD_CLIENT_REGISTERED_H

#include "kernels/paged.h"
#include "kvd/kvd.h"

// The buffers that K and V of each layer lie in, [2][layers], which stay until they are released.
// NULL: not all of them do, or this kvd takes no references to blocks.
kvd_buffer **kvd_registered_hold(kvd_client *c, const struct kvd_paged_kv *kv, bool on_gpu);
// *held becomes NULL.
void kvd_registered_release(kvd_client *c, kvd_buffer ***held, uint32_t layers);

#endif
