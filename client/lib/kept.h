// Whether a kvd that does not answer is being started again.
#ifndef KVD_CLIENT_KEPT_H
#define KVD_CLIENT_KEPT_H

#include <stdbool.h>

// Of a unix socket's path. False where nobody starts it again, or who does so does not say.
bool kvd_kept(const char *path);

#endif
