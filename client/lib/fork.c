// What becomes of clients in a forked child. gRPC's threads and libkvd's own are not there, and its
// connections are the parent's: a child must not speak over them, nor end the parent's session when
// it exits. So clients are marked in the child, every function refuses a marked one, and what
// closes it releases memory alone. The child gives up the sockets whose hang-up tells the daemon
// that the worker is dead: otherwise a session would live as long as some child.
#include "client/lib/client.h"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static kvd_client *clients; // open ones; in a child, also those of the parent, for good
static bool used;           // some were ever open here, or where this process was forked from
static bool orphaned;       // this process was forked from one that used gRPC

static void before(void)
{
    pthread_mutex_lock(&lock);
}

static void in_parent(void)
{
    pthread_mutex_unlock(&lock);
}

static void in_child(void)
{
    for (kvd_client *c = clients; c; c = c->next) {
        int sock = KVD_TAKE_FD(c->sock);
        if (sock >= 0)
            close(sock);
        c->forked = true;
    }
    // Of clients that are closed too: what gRPC keeps beyond its shutdown is not always at rest.
    orphaned = used;
    pthread_mutex_unlock(&lock);
}

static void prepare(void)
{
    pthread_atfork(before, in_parent, in_child);
}

int kvd_fork_watch(kvd_client *c, struct kvd_error *err)
{
    pthread_once(&once, prepare);
    pthread_mutex_lock(&lock);
    bool refused = orphaned;
    if (!refused) {
        used = true;
        c->next = clients;
        clients = c;
    }
    pthread_mutex_unlock(&lock);
    if (refused)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "this process was forked from one that has had kvd clients, which gRPC "
                        "does not survive: open clients after forking only, or start processes "
                        "that exec (in Python, multiprocessing's spawn)");
    return KVD_OK;
}

void kvd_fork_forget(kvd_client *c)
{
    pthread_mutex_lock(&lock);
    kvd_client **link = &clients;
    while (*link && *link != c)
        link = &(*link)->next;
    if (*link)
        *link = c->next;
    pthread_mutex_unlock(&lock);
}

int kvd_fork_check(const kvd_client *c, struct kvd_error *err)
{
    return c->forked ? kvd_fail(err, KVD_E_PRECONDITION,
                                "this client belongs to the process that forked this one; only "
                                "that one can use it")
                     : KVD_OK;
}
