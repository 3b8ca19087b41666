// What a forked child can do with its parent's client: nothing, said clearly, and without harm.
// usage: client fork ADDRESS            children that use, close, ignore it
//        client fork ADDRESS first      a parent that forks before it opens any client
//        client fork ADDRESS after      and one that has closed them all
//        client fork ADDRESS outlived   a child that outlives its parent
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client.h"

static kvd_direct *direct;

// A child has no threads but its own; what only theirs pointed to is no leak of libkvd's.
// LeakSanitizer asks for this.
static int is_child;
__attribute__((visibility("default"))) int __lsan_is_turned_off(void);
int __lsan_is_turned_off(void)
{
    return is_child;
}

static void refused(int line, kvd_result rc)
{
    if (rc == KVD_ERR_PRECONDITION && strstr(failure.text, "forked"))
        return;
    fprintf(stderr, "line %d: in a child: %d %s\n", line, (int)rc, rc ? failure.text : "no error");
    _exit(1);
}
#define REFUSED(call) refused(__LINE__, call)

static void use_work(void)
{
    kvd_item item = item_of(1);
    kvd_tensor_ref x = {.buffer = buffer};
    kvd_buffer *b;
    uint64_t ids[1] = {id};
    REFUSED(kvd_append(client, ALL, &item, 1, ERR));
    REFUSED(kvd_attend(client, ALL, NULL, &item, 1, ERR));
    REFUSED(kvd_step(client, ALL, NULL, &item, 1, ERR));
    REFUSED(kvd_enqueue(client, NULL, KVD_CALL_STEP, ALL, NULL, &item, 1, ERR));
    REFUSED(kvd_enqueued(client, ERR));
    REFUSED(kvd_rotate(client, KVD_KEYS, false, ALL, 1, KV, &x, &x, ERR));
    REFUSED(kvd_read_tokens(client, ALL, id, 0, 1, &x, NULL, ERR));
    REFUSED(kvd_buffer_new(client, 4096, &b, ERR));
    REFUSED(kvd_buffer_cuda_ipc(client, (uint8_t[64]){0}, 0, 4096, &b, ERR));
    REFUSED(kvd_buffer_cuda_fd(client, 0, 4096, &b, ERR));
    REFUSED(kvd_sequences_create(client, 1, ids, ERR));
    REFUSED(kvd_sequence_fork(client, id, 1, ids, ERR));
    REFUSED(kvd_sequence_truncate(client, id, 0, ERR));
    REFUSED(kvd_sequence_publish(client, id, "x", false, ERR));
    REFUSED(kvd_sequences_free(client, ids, 1, false, ERR));
}

static void use_rest(const char *address)
{
    kvd_info info = KVD_NEW(kvd_info);
    kvd_sequence_info s = KVD_NEW(kvd_sequence_info);
    kvd_event event = KVD_NEW(kvd_event);
    kvd_options o = options_of(address);
    kvd_direct_options d = KVD_NEW(kvd_direct_options, .slots = 1, .max_tokens = 10);
    static float x[SLOTS_BYTES / 4] __attribute__((aligned(64)));
    kvd_client *other;
    kvd_direct *another;
    uint64_t length;
    REFUSED(kvd_get_info(client, &info, ERR));
    REFUSED(kvd_sequence_attach(client, "x", &s, ERR));
    REFUSED(kvd_sequence_describe(client, id, &s, ERR));
    REFUSED(kvd_next_event(client, 100, &event, ERR));
    REFUSED(kvd_open(&o, &other, ERR));
    REFUSED(kvd_direct_begin(direct, NULL, ERR));
    REFUSED(kvd_store_enqueue(direct, NULL, 0, x, KV * DIM_K * 2, x, KV * DIM_V * 2, ERR));
    REFUSED(kvd_attend_enqueue(direct, NULL, 0, x, HEADS * DIM_K * 2, x, HEADS * DIM_V * 2, NULL, 0,
                               ERR));
    REFUSED(kvd_direct_end(direct, NULL, NULL, ERR));
    REFUSED(kvd_direct_flush(direct, ERR));
    REFUSED(kvd_direct_bind(direct, 0, id, ERR));
    REFUSED(kvd_direct_length(direct, 0, &length, NULL, ERR));
    kvd_direct_close(&direct);
    REFUSED(kvd_direct_open(client, &d, &another, ERR));
}

// A child that must end well, and by itself, soon.
static void child(const char *address, bool uses, bool closes)
{
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        is_child = 1;
        alarm(20);
        if (uses) {
            use_work();
            use_rest(address);
        }
        if (closes) {
            kvd_direct_close(&direct);
            kvd_buffer_free(&buffer);
            kvd_close(&client);
        }
        exit(0); // and whatever is registered with atexit
    }
    int status;
    NEED(waitpid(pid, &status, 0) == pid);
    if (!WIFEXITED(status) || WEXITSTATUS(status)) {
        fprintf(stderr, "a child ended with status %x\n", (unsigned)status);
        exit(1);
    }
    kvd_sequence_info info = KVD_NEW(kvd_sequence_info); // the parent's session lives
    kvd_item item = item_of(1);
    NEED(kvd_sequence_describe(client, id, &info, ERR) == 0);
    item.position = info.length;
    NEED(kvd_step(client, ALL, NULL, &item, 1, ERR) == 0);
}

static void whole_worker(const char *address)
{
    open_client(address);
    kvd_item item = item_of(3);
    NEED(kvd_step(client, ALL, NULL, &item, 1, ERR) == 0);
    kvd_close(&client);
}

enum { MAX_FD = 256 };
static bool inherited[MAX_FD]; // from whoever started this program

static void note_inherited(void)
{
    for (int fd = 0; fd < MAX_FD; fd++)
        inherited[fd] = fcntl(fd, F_GETFD) >= 0;
}

static void descriptors(void)
{
    for (int fd = 0; fd < MAX_FD; fd++) {
        int flags = inherited[fd] ? -1 : fcntl(fd, F_GETFD);
        char name[64], to[256] = "";
        snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
        if (flags < 0 || flags & FD_CLOEXEC || readlink(name, to, sizeof(to) - 1) < 0)
            continue;
        fprintf(stderr, "descriptor %d, %s, is not close-on-exec\n", fd, to);
        exit(1);
    }
}

static int around_clients(const char *address, bool after)
{
    if (after)
        whole_worker(address);
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(20);
        kvd_options o = options_of(address);
        if (after)
            REFUSED(kvd_open(&o, &client, ERR));
        else
            whole_worker(address);
        exit(0);
    }
    int status;
    whole_worker(address);
    NEED(waitpid(pid, &status, 0) == pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

int forks(const char *address, const char *how)
{
    uint64_t bound;
    kvd_event event = KVD_NEW(kvd_event);
    kvd_direct_options d = KVD_NEW(kvd_direct_options, .slots = 1, .max_tokens = 1000);
    if (strcmp(how, "first") == 0 || strcmp(how, "after") == 0)
        return around_clients(address, how[0] == 'a');
    note_inherited();
    open_client(address);
    NEED(kvd_sequences_create(client, 1, &bound, ERR) == 0);
    NEED(kvd_next_event(client, 5000, &event, ERR) == 0 && event.kind == KVD_EVENT_OPENED);
    NEED(kvd_direct_open(client, &d, &direct, ERR) == 0);
    NEED(kvd_direct_bind(direct, 0, bound, ERR) == 0);
    if (strcmp(how, "outlived") == 0) {
        if (fork() == 0) {
            pause(); // until the test ends it
            _exit(0);
        }
        _exit(0); // as if killed
    }
    descriptors();
    child(address, false, false);
    child(address, false, true);
    child(address, true, true);
    child(address, true, false);
    kvd_direct_close(&direct);
    kvd_close(&client);
    return 0;
}
