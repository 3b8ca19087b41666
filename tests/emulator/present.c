#include "kernels/backend.h"

// The emulated GPU is always there.
int kvd_cuda_present(struct kvd_error *err)
{
    (void)err;
    return KVD_OK;
}
