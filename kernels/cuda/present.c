#include "kernels/backend.h"

#include <unistd.h>

// The runtime's own words for a host without a GPU are about versions.
int kvd_cuda_present(struct kvd_error *err)
{
    if (access("/dev/nvidiactl", F_OK) == 0 || access("/dev/dxg", F_OK) == 0)
        return KVD_OK;
    return kvd_fail(err, KVD_E_UNAVAILABLE,
                    "no NVIDIA GPU was found: there is no /dev/nvidiactl (is the driver loaded, "
                    "has the container been given the device?)");
}
