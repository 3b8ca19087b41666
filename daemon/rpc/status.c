// The one place where kvd's status codes meet gRPC's.
#include "daemon/rpc/rpc.h"

grpc_status_code kvd_status_to_grpc(int code)
{
    static const grpc_status_code map[] = {
        [KVD_OK] = GRPC_STATUS_OK,
        [KVD_E_INVALID] = GRPC_STATUS_INVALID_ARGUMENT,
        [KVD_E_NOT_FOUND] = GRPC_STATUS_NOT_FOUND,
        [KVD_E_EXISTS] = GRPC_STATUS_ALREADY_EXISTS,
        [KVD_E_PRECONDITION] = GRPC_STATUS_FAILED_PRECONDITION,
        [KVD_E_QUOTA] = GRPC_STATUS_RESOURCE_EXHAUSTED,
        [KVD_E_FULL] = GRPC_STATUS_RESOURCE_EXHAUSTED,
        [KVD_E_LIMIT] = GRPC_STATUS_RESOURCE_EXHAUSTED,
        [KVD_E_DENIED] = GRPC_STATUS_PERMISSION_DENIED,
        [KVD_E_UNAUTH] = GRPC_STATUS_UNAUTHENTICATED,
        [KVD_E_UNAVAILABLE] = GRPC_STATUS_UNAVAILABLE,
        [KVD_E_CORRUPT] = GRPC_STATUS_DATA_LOSS,
        [KVD_E_UNSUPPORTED] = GRPC_STATUS_UNIMPLEMENTED,
        [KVD_E_TIMEOUT] = GRPC_STATUS_DEADLINE_EXCEEDED,
        [KVD_E_LOST] = GRPC_STATUS_ABORTED,
        [KVD_E_INTERNAL] = GRPC_STATUS_INTERNAL,
    };
    if (code == -ENOSPC || code == -EDQUOT || code == -ENOMEM)
        return GRPC_STATUS_RESOURCE_EXHAUSTED;
    if (code < 0 || (size_t)code >= KVD_LEN(map))
        return GRPC_STATUS_INTERNAL;
    return map[code];
}

const char *kvd_grpc_code_name(int code)
{
    static const char *const names[KVD_GRPC_CODES] = {
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    };
    return names[code];
}
