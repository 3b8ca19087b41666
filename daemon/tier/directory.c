#include "daemon/tier/directory.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <uthash.h>
#include <utlist.h>

#include "daemon/core/log.h"
#include "daemon/tier/threads.h"

enum {
    THREADS = 4,
    SCAN_S = 300,
    TOUCH_S = 60,      // a file's time of use is not newer than needed
    LEFTOVER_S = 3600, // files of a crash that never got their name
    MOST_STAY = 16,    // files that cannot be dropped, before a put finds no room
    NAME = 3 + KVD_TIER_KEY_TEXT + 40,
};

struct file {
    struct kvd_tier_key key;
    uint64_t bytes;
    time_t used;
    uint32_t scan;  // the last one that met it, or in which it was made
    uint32_t flush; // the last one that could not drop it
    UT_hash_handle hh;
    struct file *prev, *next; // least recently used first
};

// The directory as it is open. One that was removed, or is not what the path names any more, is
// closed when nobody uses it.
struct root {
    int fd;
    uint32_t users; // and the tier, while it is the one to use
};

struct directory {
    char *path;
    uint64_t limit, ttl_s;
    struct kvd_tier_threads *threads;
    atomic_bool ending;
    pthread_mutex_t lock; // of what follows
    struct root *root;    // NULL: not open yet
    bool no_direct;       // the file system has no O_DIRECT
    struct file *by_key, *by_use;
    uint32_t scan, flush;
    uint64_t names;              // made
    atomic_ullong bytes, blocks; // read without the lock
    atomic_int unusable;         // 0, or the errno for which it was not opened
    pthread_mutex_t count_lock;  // of `lost`: the loop never waits for a scan
    struct kvd_tier_lost lost;
};

// -- names --------------------------------------------------------------------------------------

static void name_of(const struct kvd_tier_key *key, char out[NAME])
{
    char hex[KVD_TIER_KEY_TEXT];
    kvd_hex(key->bytes, sizeof(key->bytes), hex);
    snprintf(out, NAME, "%.2s/%s", hex, hex + 2);
}

static int digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// The key of file `name` in folder `folder`, both as name_of makes them.
static bool key_of(const char *folder, const char *name, struct kvd_tier_key *out)
{
    char hex[KVD_TIER_KEY_TEXT];
    if (strlen(folder) != 2 || strlen(name) != KVD_TIER_KEY_TEXT - 3)
        return false;
    snprintf(hex, sizeof(hex), "%s%s", folder, name);
    for (uint32_t i = 0; i < KVD_TIER_KEY_BYTES; i++) {
        int high = digit(hex[2 * i]), low = digit(hex[2 * i + 1]);
        if (high < 0 || low < 0)
            return false;
        out->bytes[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}

// -- what is there, as far as is known ----------------------------------------------------------

static void forget(struct directory *d, struct file *f)
{
    HASH_DEL(d->by_key, f);
    DL_DELETE(d->by_use, f);
    d->bytes -= f->bytes;
    d->blocks--;
    free(f);
}

static struct file *find(struct directory *d, const struct kvd_tier_key *key)
{
    struct file *f;
    HASH_FIND(hh, d->by_key, key, sizeof(*key), f);
    return f;
}

// Notes a file, or that it was used.
static void note(struct directory *d, const struct kvd_tier_key *key, uint64_t bytes, time_t used)
{
    struct file *f = find(d, key);
    if (f) {
        DL_DELETE(d->by_use, f);
        d->bytes -= f->bytes;
    } else {
        f = calloc(1, sizeof(*f));
        if (!f)
            return; // the next scan finds it
        f->key = *key;
        HASH_ADD(hh, d->by_key, key, sizeof(f->key), f);
        d->blocks++;
    }
    f->bytes = bytes;
    f->used = used;
    f->scan = d->scan;
    d->bytes += bytes;
    DL_APPEND(d->by_use, f);
}

// 0, or the errno for which the file stays. One that stays is known still, behind the others.
static int drop(struct directory *d, int root, const struct kvd_tier_key *key)
{
    char name[NAME];
    name_of(key, name);
    int rc = unlinkat(root, name, 0) && errno != ENOENT ? errno : 0;
    pthread_mutex_lock(&d->lock);
    struct file *f = find(d, key);
    if (f && !rc) {
        forget(d, f);
    } else if (f) {
        DL_DELETE(d->by_use, f);
        DL_APPEND(d->by_use, f);
    }
    pthread_mutex_unlock(&d->lock);
    return rc;
}

// -- the directory ------------------------------------------------------------------------------

// Under the lock, as what follows.
static void root_leave(struct root *r)
{
    if (--r->users)
        return;
    close(r->fd);
    free(r);
}

// Whether it is to be used no more: it was removed, or (`looks`) the path names another one by now.
// There are file systems on which no directory has a link.
static bool is_gone(const struct root *r, const char *path, bool looks)
{
    struct stat ours, there;
    if (fstat(r->fd, &ours))
        return true;
    if (ours.st_nlink && !looks)
        return false;
    if (stat(path, &there))
        return ours.st_nlink == 0;
    return ours.st_dev != there.st_dev || ours.st_ino != there.st_ino;
}

// Opens the directory, also where it was removed and is made again. 0 or an errno.
static int root_open(struct directory *d)
{
    struct root *r = malloc(sizeof(*r));
    if (!r)
        return ENOMEM;
    *r = (struct root){.fd = -1, .users = 1};
    if (mkdir(d->path, 0700) == 0 || errno == EEXIST)
        r->fd = open(d->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (r->fd < 0) {
        int rc = errno;
        free(r);
        return rc;
    }
    d->root = r;
    return 0;
}

static void tell_usable(struct directory *d, int was, int is)
{
    const char *name = strrchr(d->path, '/');
    int parent = name && name > d->path ? (int)(name - d->path) : 1;
    if (!is == !was)
        return;
    if (!is)
        kvd_notice("tier directory: %s is there", d->path);
    else if (is == ENOENT) // it would be made
        kvd_warning("tier directory: %.*s is not there: it misses until it is", parent, d->path);
    else
        kvd_warning("tier directory: %s: %s: it misses until that is mended", d->path,
                    strerror(is));
}

// The directory, which is opened when it is first wanted, so that a disk that comes late is found.
// `looks`: also whether the path names another one by now. *fresh: what is there is not known. NULL
// with *why set.
static struct root *root_take(struct directory *d, bool looks, bool *fresh, int *why)
{
    *fresh = d->unusable;
    *why = 0;
    pthread_mutex_lock(&d->lock);
    if (d->root && is_gone(d->root, d->path, looks)) {
        root_leave(KVD_TAKE(d->root));
        while (d->by_use)
            forget(d, d->by_use);
        d->no_direct = false; // it may be on another file system
        *fresh = true;
    }
    if (!d->root)
        *why = root_open(d);
    struct root *r = d->root;
    if (r)
        r->users++;
    pthread_mutex_unlock(&d->lock);
    tell_usable(d, atomic_exchange(&d->unusable, *why), *why);
    return r;
}

static void root_give(struct directory *d, struct root *r)
{
    pthread_mutex_lock(&d->lock);
    root_leave(r);
    pthread_mutex_unlock(&d->lock);
}

// -- what goes ----------------------------------------------------------------------------------

static void count_lost(struct directory *d, enum kvd_tier_loss why, time_t used)
{
    pthread_mutex_lock(&d->count_lock);
    kvd_tier_lose(&d->lost, why, used);
    pthread_mutex_unlock(&d->count_lock);
}

// Drops the least recently used until so many bytes more have room. 0, or the errno for which files
// stay.
static int make_room(struct directory *d, int root, uint64_t bytes)
{
    for (uint32_t stay = 0;;) {
        pthread_mutex_lock(&d->lock);
        bool none = d->bytes + bytes <= d->limit || !d->by_use;
        struct kvd_tier_key key = none ? (struct kvd_tier_key){0} : d->by_use->key;
        time_t used = none ? 0 : d->by_use->used;
        pthread_mutex_unlock(&d->lock);
        if (none)
            return 0;
        int rc = drop(d, root, &key);
        if (rc && ++stay == MOST_STAY)
            return rc;
        if (rc == 0)
            count_lost(d, KVD_TIER_LOST_ROOM, used);
    }
}

static int by_time(const struct file *a, const struct file *b)
{
    return (a->used > b->used) - (a->used < b->used);
}

// One folder: notes what is new, drops what is too old. 0, or the errno for which nobody knows what
// is there.
static int scan_folder(struct directory *d, int root, const char *folder, uint32_t scan)
{
    int fd = openat(root, folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
    int rc = dir || errno == ENOENT || errno == ENOTDIR ? 0 : errno;
    time_t now = time(NULL);
    struct dirent *e;
    if (!dir && fd >= 0)
        close(fd);
    while (dir && !d->ending && (e = readdir(dir))) {
        struct kvd_tier_key key;
        struct stat st;
        bool block = key_of(folder, e->d_name, &key);
        if (e->d_name[0] == '.' || fstatat(fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) ||
            !S_ISREG(st.st_mode))
            continue;
        const char *end = strrchr(e->d_name, '.');
        time_t most = block ? (time_t)d->ttl_s : end && strcmp(end, ".new") == 0 ? LEFTOVER_S : 0;
        if (most && now - st.st_mtime > most) {
            if (unlinkat(fd, e->d_name, 0) == 0 && block)
                count_lost(d, KVD_TIER_LOST_EXPIRED, st.st_mtime);
        } else if (block) {
            pthread_mutex_lock(&d->lock);
            struct file *f = find(d, &key);
            if (f)
                f->scan = KVD_MAX(f->scan, scan);
            else
                note(d, &key, (uint64_t)st.st_size, st.st_mtime);
            pthread_mutex_unlock(&d->lock);
        }
    }
    if (dir)
        closedir(dir);
    return rc;
}

// 0, or an errno for which not all of it was looked at.
static int scan(struct directory *d, int root)
{
    struct file *f, *tmp;
    int bad = 0;
    pthread_mutex_lock(&d->lock);
    uint32_t number = ++d->scan;
    pthread_mutex_unlock(&d->lock);
    for (uint32_t i = 0; i < 256 && !d->ending; i++) {
        char folder[4];
        snprintf(folder, sizeof(folder), "%02x", i);
        int rc = scan_folder(d, root, folder, number);
        bad = bad ? bad : rc;
    }
    if (d->ending)
        return bad;
    pthread_mutex_lock(&d->lock);
    DL_FOREACH_SAFE(d->by_use, f, tmp)
    if (f->scan < number)
        forget(d, f);
    DL_SORT(d->by_use, by_time);
    pthread_mutex_unlock(&d->lock);
    make_room(d, root, 0);
    return bad;
}

static void look_over(void *ctx)
{
    struct directory *d = ctx;
    bool fresh;
    int why;
    struct root *r = root_take(d, true, &fresh, &why);
    if (!r)
        return;
    scan(d, r->fd);
    root_give(d, r);
}

// -- operations, on a thread --------------------------------------------------------------------

static bool direct(struct directory *d)
{
    pthread_mutex_lock(&d->lock);
    bool yes = !d->no_direct;
    pthread_mutex_unlock(&d->lock);
    return yes;
}

// Opens with O_DIRECT where that is possible.
static int open_file(struct directory *d, int root, const char *name, int flags)
{
    bool try = direct(d);
    int fd = openat(root, name, flags | O_CLOEXEC | O_NOFOLLOW | (try ? O_DIRECT : 0), 0600);
    if (fd >= 0 || !try || errno != EINVAL)
        return fd;
    pthread_mutex_lock(&d->lock);
    d->no_direct = true;
    pthread_mutex_unlock(&d->lock);
    return openat(root, name, (flags & ~O_EXCL) | O_CLOEXEC | O_NOFOLLOW, 0600);
}

// Reads or writes all of it. 0, or an errno; EIO for a file that ends early.
static int transfer(int fd, uint8_t *data, size_t bytes, bool writing)
{
    for (size_t done = 0; done < bytes;) {
        ssize_t n = writing ? pwrite(fd, data + done, bytes - done, (off_t)done)
                            : pread(fd, data + done, bytes - done, (off_t)done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? errno : EIO;
        done += (size_t)n;
    }
    return 0;
}

// Writes the block as file `name`, by way of another name. 0 or an errno.
static int write_block(struct directory *d, int root, const char *name,
                       const struct kvd_block *block)
{
    char temporary[NAME], folder[4];
    size_t bytes;
    uint8_t *data = kvd_block_padded(block, &bytes);
    pthread_mutex_lock(&d->lock);
    uint64_t number = d->names++;
    pthread_mutex_unlock(&d->lock);
    snprintf(temporary, sizeof(temporary), "%.67s.%d-%" PRIu64 ".new", name, (int)getpid(), number);
    snprintf(folder, sizeof(folder), "%.2s", name);
    int flags = O_WRONLY | O_CREAT | O_EXCL;
    int fd KVD_CLOSE = open_file(d, root, temporary, flags);
    if (fd < 0 && errno == ENOENT && (mkdirat(root, folder, 0700) == 0 || errno == EEXIST))
        fd = open_file(d, root, temporary, flags);
    if (fd < 0)
        return errno;
    int rc = transfer(fd, data, bytes, true);
    if (rc == 0 && renameat(root, temporary, root, name))
        rc = errno;
    if (rc)
        unlinkat(root, temporary, 0);
    return rc;
}

// Whether the file is there, of the length that it is to have, and has half of its time before it.
static bool is_fresh(int root, const char *name, uint64_t bytes, uint64_t ttl_s)
{
    uint8_t header[KVD_BLOCK_HEADER];
    struct stat st;
    int fd KVD_CLOSE = openat(root, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0 || fstat(fd, &st) || (uint64_t)st.st_size != bytes)
        return false;
    if (!ttl_s)
        return true;
    ssize_t n = pread(fd, header, sizeof(header), KVD_BLOCK_FRONT - KVD_BLOCK_HEADER);
    return n == (ssize_t)sizeof(header) &&
           kvd_block_stored(header, sizeof(header)) + ttl_s / 2 > (uint64_t)time(NULL);
}

static void put(struct directory *d, int root, struct kvd_tier_op *op)
{
    char name[NAME];
    struct kvd_error err = {0};
    size_t bytes;
    kvd_block_padded(op->block, &bytes);
    name_of(&op->keys[0], name);
    if (bytes > d->limit) {
        kvd_tier_fail(op, KVD_TIER_FULL, "a block of %zu bytes is more than its size", bytes);
        return;
    }
    if (kvd_block_seal(op->block, op->settings.secret, &op->keys[0], op->layout,
                       (uint64_t)time(NULL), &err)) {
        kvd_tier_fail(op, KVD_TIER_FAILED, "%.100s", err.text);
        return;
    }
    bool fresh = is_fresh(root, name, bytes, op->settings.ttl_s);
    int rc = fresh ? 0 : make_room(d, root, bytes);
    if (rc) {
        kvd_tier_fail(op, KVD_TIER_FULL, "%.60s: what is there cannot be dropped: %s", d->path,
                      strerror(rc));
        return;
    }
    rc = fresh ? 0 : write_block(d, root, name, op->block);
    if (rc) {
        bool full = rc == ENOSPC || rc == EDQUOT || rc == EFBIG;
        kvd_tier_fail(op, full ? KVD_TIER_FULL : KVD_TIER_FAILED, "%.60s: %s", d->path,
                      strerror(rc));
        return;
    }
    pthread_mutex_lock(&d->lock);
    note(d, &op->keys[0], bytes, time(NULL));
    pthread_mutex_unlock(&d->lock);
    kvd_tier_finish(op, KVD_TIER_OK);
}

// Reads and verifies an open file into op->block. KVD_E_CORRUPT, KVD_E_NOT_FOUND, a negative errno.
static int read_block(int fd, struct kvd_tier_op *op, const struct stat *st, struct kvd_error *err)
{
    size_t bytes;
    op->block = kvd_block_new_in(op->settings.memory, op->bytes);
    if (!op->block)
        return kvd_fail(err, -ENOMEM, "out of memory");
    uint8_t *data = kvd_block_padded(op->block, &bytes);
    if (!S_ISREG(st->st_mode) || (uint64_t)st->st_size != bytes)
        return kvd_fail(err, KVD_E_CORRUPT, "the file is of another length");
    int rc = transfer(fd, data, bytes, false);
    if (rc)
        return kvd_fail(err, -rc, "%s", strerror(rc));
    return kvd_block_verify(op->block, op->settings.secret, &op->keys[0], op->layout,
                            (uint64_t)time(NULL), op->settings.ttl_s, err);
}

static void get(struct directory *d, int root, struct kvd_tier_op *op)
{
    char name[NAME];
    struct kvd_error err = {0};
    struct stat st;
    name_of(&op->keys[0], name);
    int fd KVD_CLOSE = open_file(d, root, name, O_RDONLY);
    if (fd < 0 && errno == ENOENT) {
        kvd_tier_finish(op, KVD_TIER_MISS);
        return;
    }
    if (fd < 0 || fstat(fd, &st)) {
        kvd_tier_fail(op, KVD_TIER_FAILED, "%.60s: %s", d->path, strerror(errno));
        return;
    }
    int rc = read_block(fd, op, &st, &err);
    if (rc) {
        kvd_block_unref(&op->block);
        int stays = rc > 0 ? drop(d, root, &op->keys[0]) : 0;
        if (stays)
            kvd_fail_in(&err, "it cannot be dropped (%s)", strerror(stays));
        else if (rc == KVD_E_NOT_FOUND)
            count_lost(d, KVD_TIER_LOST_EXPIRED, st.st_mtime);
        kvd_tier_fail(op,
                      rc == KVD_E_CORRUPT     ? KVD_TIER_DAMAGED
                      : rc == KVD_E_NOT_FOUND ? KVD_TIER_MISS
                                              : KVD_TIER_FAILED,
                      "%.100s", err.text);
        return;
    }
    time_t now = time(NULL);
    if (now - st.st_mtime > TOUCH_S)
        futimens(fd, NULL);
    pthread_mutex_lock(&d->lock);
    note(d, &op->keys[0], (uint64_t)st.st_size, now);
    pthread_mutex_unlock(&d->lock);
    kvd_tier_finish(op, KVD_TIER_OK);
}

static void has(struct directory *d, int root, struct kvd_tier_op *op)
{
    time_t now = time(NULL);
    for (uint32_t i = 0; i < op->n && !d->ending; i++) {
        char name[NAME];
        struct stat st;
        name_of(&op->keys[i], name);
        op->has[i] = fstatat(root, name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
                     (d->ttl_s == 0 || now - st.st_mtime <= (time_t)d->ttl_s);
    }
    kvd_tier_finish(op, KVD_TIER_OK);
}

// The next one that a flush has not tried to drop. False: there is none.
static bool next_to_flush(struct directory *d, uint32_t number, struct kvd_tier_key *key)
{
    struct file *f;
    pthread_mutex_lock(&d->lock);
    for (f = d->by_use; f && f->flush == number; f = f->next)
        continue;
    if (f) {
        f->flush = number;
        *key = f->key;
    }
    pthread_mutex_unlock(&d->lock);
    return f;
}

// All that is ours, whoever of those that share the directory has put it.
static void flush(struct directory *d, int root, struct kvd_tier_op *op)
{
    struct kvd_tier_key key;
    uint32_t stay = 0;
    int unseen = scan(d, root), why = 0;
    pthread_mutex_lock(&d->lock);
    uint32_t number = ++d->flush;
    pthread_mutex_unlock(&d->lock);
    while (!d->ending && next_to_flush(d, number, &key)) {
        int rc = drop(d, root, &key);
        stay += rc != 0;
        why = rc ? rc : why;
    }
    if (stay)
        kvd_tier_fail(op, KVD_TIER_FAILED, "%.60s: %u files stay: %s", d->path, stay,
                      strerror(why));
    else if (unseen)
        kvd_tier_fail(op, KVD_TIER_FAILED, "%.60s: not all of it can be read: %s", d->path,
                      strerror(unseen));
    else
        kvd_tier_finish(op, KVD_TIER_OK);
}

static void drop_one(struct directory *d, int root, struct kvd_tier_op *op)
{
    int rc = drop(d, root, &op->keys[0]);
    if (rc)
        kvd_tier_fail(op, KVD_TIER_FAILED, "%.60s: a block stays: %s", d->path, strerror(rc));
    else
        kvd_tier_finish(op, KVD_TIER_OK);
}

static void work(struct directory *d, int root, struct kvd_tier_op *op)
{
    switch (op->verb) {
    case KVD_TIER_PUT:
        put(d, root, op);
        return;
    case KVD_TIER_GET:
        get(d, root, op);
        return;
    case KVD_TIER_HAS:
        has(d, root, op);
        return;
    case KVD_TIER_DROP:
        drop_one(d, root, op);
        return;
    default:
        flush(d, root, op);
    }
}

static void run(void *ctx, struct kvd_tier_op *op)
{
    struct directory *d = ctx;
    bool fresh;
    int why;
    struct root *r = root_take(d, op->verb == KVD_TIER_FLUSH, &fresh, &why);
    if (!r) {
        kvd_tier_fail(op, KVD_TIER_FAILED, "%.60s: %s", d->path, strerror(why));
        return;
    }
    work(d, r->fd, op);
    if (fresh)
        scan(d, r->fd);
    root_give(d, r);
}

// -- its life -----------------------------------------------------------------------------------

static void directory_free(void *ctx)
{
    struct directory *d = ctx;
    while (d->by_use)
        forget(d, d->by_use);
    if (d->root)
        root_leave(d->root);
    pthread_mutex_destroy(&d->lock);
    pthread_mutex_destroy(&d->count_lock);
    free(d->path);
    free(d);
}

void *kvd_tier_directory_new(const char *path, uint64_t limit, uint64_t ttl_s,
                             struct kvd_error *err)
{
    static const struct kvd_tier_work work = {
        .run = run, .now_and_then = look_over, .every_s = SCAN_S, .free = directory_free};
    struct directory *d = calloc(1, sizeof(*d));
    if (!d || !(d->path = strdup(path))) {
        free(d);
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    d->limit = limit;
    d->ttl_s = ttl_s;
    pthread_mutex_init(&d->lock, NULL);
    pthread_mutex_init(&d->count_lock, NULL);
    d->threads = kvd_tier_threads_new(THREADS, &work, d, err);
    if (!d->threads) {
        directory_free(d);
        return NULL;
    }
    return d;
}

static void submit(void *state, struct kvd_tier_op *op)
{
    struct directory *d = state;
    kvd_tier_threads_add(d->threads, op);
}

static bool directory_close(void *state, const struct timespec *deadline)
{
    struct directory *d = state;
    struct kvd_tier_threads *threads = d->threads; // d may be gone with the last of them
    d->ending = true;
    return kvd_tier_threads_close(&threads, deadline);
}

static void status(void *state, struct kvd_tier_status *out)
{
    struct directory *d = state;
    snprintf(out->where, sizeof(out->where), "%s", d->path);
    out->blocks = d->blocks;
    out->bytes = d->bytes;
    out->limit = d->limit;
    int why = d->unusable;
    if (why)
        kvd_tier_down(out, "%.60s: %s", d->path, strerror(why));
    pthread_mutex_lock(&d->count_lock);
    out->lost = d->lost;
    pthread_mutex_unlock(&d->count_lock);
}

const struct kvd_tier_ops kvd_tier_directory_ops = {
    .name = "directory",
    .most_running = THREADS + 4, // some in line, so that no thread waits for the loop
    .submit = submit,
    .close = directory_close,
    .status = status,
};
