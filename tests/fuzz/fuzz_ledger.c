// Opening a ledger of sessions that was damaged: the input is what to overwrite in a good one. It
// is refused, or it can be used.
#include "daemon/session/ledger.h"
#include "tests/fuzz/file.h"

#include <sys/stat.h>

enum { SESSIONS = 3, HOLDS = 64 };

static int fd = -1;
static uint8_t *good, *spoiled;
static size_t bytes;

static void make_good(void)
{
    struct kvd_error err = {0};
    struct stat st;
    struct kvd_ledger *l = kvd_ledger_new(SESSIONS, HOLDS, &err);
    if (!l)
        abort();
    for (uint32_t i = 0; i < SESSIONS; i++) {
        struct kvd_ledger_session s = {.id = kvd_ledger_next_id(l),
                                       .generation = 1,
                                       .secret = "0123456789abcdef0123456789abcdef",
                                       .ns = "n"};
        uint32_t record = kvd_ledger_add(l, &s);
        for (uint64_t seq = 0; seq < 10; seq++)
            kvd_ledger_hold(l, record, KVD_LEDGER_NONE, seq);
        kvd_ledger_remember(l, record, 5 + i, 9, "a reply of some bytes", 21);
        kvd_ledger_hold(l, record, KVD_LEDGER_NONE, 11); // of a call that is not done
        kvd_ledger_freeing_begin(l, record, 77);
    }
    if (fstat(kvd_ledger_fd(l), &st))
        abort();
    bytes = (size_t)st.st_size;
    good = malloc(bytes);
    if (!good || pread(kvd_ledger_fd(l), good, bytes, 0) != (ssize_t)bytes)
        abort();
    kvd_ledger_close(&l);
    fd = memfd_create("ledger", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)bytes))
        abort();
    spoiled = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (spoiled == MAP_FAILED)
        abort();
}

// Places: anywhere, or where records begin.
static void spoil(const uint8_t *data, size_t size)
{
    memcpy(spoiled, good, bytes);
    while (size >= 4) {
        uint32_t at;
        memcpy(&at, data, sizeof(at));
        data += 4;
        size -= 4;
        size_t n = KVD_MIN(size, (size_t)(at >> 28) + 1), place = at & 0xfffffff;
        place = place % 4 == 0   ? place / 4 % 128
                : place % 4 == 1 ? 4096 + place / 4 % 8192
                : place % 4 == 2 ? bytes - 1 - place / 4 % 4096
                                 : place / 4 % bytes;
        memcpy(spoiled + place, data, KVD_MIN(n, bytes - place));
        data += n;
        size -= n;
    }
}

static void use(struct kvd_ledger *l)
{
    for (uint32_t i = 0; i < kvd_ledger_sessions(l); i++) {
        uint64_t method;
        size_t length;
        if (!kvd_ledger_session(l, i))
            continue;
        for (uint64_t request = 1; request < 10; request++)
            free(kvd_ledger_recall(l, i, request, &method, &length));
        uint32_t hold = kvd_ledger_hold(l, i, KVD_LEDGER_NONE, 20);
        kvd_ledger_remember(l, i, 100, 9, "more", 4);
        if (hold != KVD_LEDGER_NONE)
            kvd_ledger_release(l, hold, 1, 101);
        kvd_ledger_resumed(l, i, 5);
    }
    for (uint32_t i = 0; i < kvd_ledger_holds(l); i++) {
        uint32_t session;
        uint64_t seq;
        if (kvd_ledger_held(l, i, &session, &seq) && session >= kvd_ledger_sessions(l))
            abort();
    }
    for (uint32_t i = 0; i < kvd_ledger_sessions(l); i++)
        if (kvd_ledger_session(l, i))
            kvd_ledger_drop(l, i);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct kvd_error err = {0};
    if (!good)
        make_good();
    spoil(data, size);
    struct kvd_ledger *l = kvd_ledger_open(fd, SESSIONS, HOLDS, &err);
    if (l)
        use(l);
    else if (!err.text[0])
        abort();
    kvd_ledger_close(&l);
    return 0;
}
