#include "calib/dump.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <openssl/evp.h>
#include <sys/stat.h>

#include "kernels/format.h"

static const char side_names[] = "qkvg";
enum { DIGITS = 16 }; // of a file's digest

static int64_t change_time(const struct stat *st)
{
    return (int64_t)st->st_mtim.tv_sec * 1000000000 + st->st_mtim.tv_nsec;
}

void kvd_dump_free(struct kvd_dump **d)
{
    if (!*d)
        return;
    for (uint32_t i = 0; i < (*d)->n_files; i++)
        free((*d)->files[i].path);
    free((*d)->files);
    free((*d)->pieces);
    free(*d);
    *d = NULL;
}

// -- files ---------------------------------------------------------------------------------------

static int add_file(struct kvd_dump *d, const char *path, uint32_t group, struct kvd_error *err)
{
    struct kvd_dump_file *files = realloc(d->files, (d->n_files + 1) * sizeof(*files));
    char *copy = strdup(path);
    if (files)
        d->files = files;
    if (!files || !copy) {
        free(copy);
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    }
    d->files[d->n_files++] = (struct kvd_dump_file){.path = copy, .group = group};
    d->n_groups = KVD_MAX(d->n_groups, group + 1);
    return KVD_OK;
}

#define HOW_TO_RECORD                                                                              \
    "a recording is a safetensors file, or a folder of them (python3 -m kvd.record MODEL makes "   \
    "one), or of OSCAR's layer_<id>/q/<n>.pt"

static int is_shard(const struct dirent *e)
{
    size_t n = strlen(e->d_name);
    return n > 12 && strcmp(e->d_name + n - 12, ".safetensors") == 0;
}

// Names "layer_7" and "3.pt": what comes before the number, and behind it. -1: it is another name.
static long numbered(const char *name, const char *before, const char *behind)
{
    size_t n = strlen(before), digits;
    if (strncmp(name, before, n) != 0)
        return -1;
    digits = strspn(name + n, "0123456789");
    return digits && digits < 9 && strcmp(name + n + digits, behind) == 0 ? atol(name + n) : -1;
}

static int compare_numbers(const void *a, const void *b)
{
    long x = *(const long *)a, y = *(const long *)b;
    return x < y ? -1 : x > y;
}

// The numbers of a folder's entries of such names, ascending; to be freed. *n is 0 where there are
// none.
static int list_numbers(const char *path, const char *before, const char *behind, long **out,
                        size_t *n, struct kvd_error *err)
{
    DIR *folder = opendir(path);
    *out = NULL;
    *n = 0;
    if (!folder)
        return kvd_fail(err, errno == ENOENT ? KVD_E_NOT_FOUND : -errno, "%s: %s", path,
                        strerror(errno));
    for (const struct dirent *e; (e = readdir(folder));) {
        long number = numbered(e->d_name, before, behind);
        long *grown = number < 0 ? NULL : realloc(*out, (*n + 1) * sizeof(**out));
        if (number >= 0 && !grown) {
            closedir(folder);
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        }
        if (grown) {
            *out = grown;
            grown[(*n)++] = number;
        }
    }
    closedir(folder);
    if (*n)
        qsort(*out, *n, sizeof(**out), compare_numbers);
    return KVD_OK;
}

// The files of one of OSCAR's layers, q, k and v of each number one after the other.
static int list_layer(struct kvd_dump *d, const char *path, long id, struct kvd_error *err)
{
    long *numbers[KVD_DUMP_SIDES] = {0};
    size_t n[KVD_DUMP_SIDES] = {0};
    char file[4096];
    int rc = KVD_OK;
    for (int s = 0; s < KVD_DUMP_SIDES && rc == KVD_OK; s++) {
        snprintf(file, sizeof(file), "%s/layer_%ld/%c", path, id, side_names[s]);
        rc = list_numbers(file, "", ".pt", &numbers[s], &n[s], err);
        if (rc == KVD_OK &&
            (n[s] == 0 || n[s] != n[0] || memcmp(numbers[s], numbers[0], n[s] * sizeof(long)) != 0))
            rc = kvd_fail(err, KVD_E_INVALID,
                          "%s: %zu files <n>.pt, and %zu of other numbers in q: a recording that "
                          "was cut?",
                          file, n[s], n[0]);
    }
    size_t first = n[0] > 1 && numbers[0] && numbers[0][0] == 0;
    for (size_t i = first; i < n[0] && rc == KVD_OK; i++)
        for (int s = 0; s < KVD_DUMP_SIDES && rc == KVD_OK; s++) {
            snprintf(file, sizeof(file), "%s/layer_%ld/%c/%ld.pt", path, id, side_names[s],
                     numbers[0][i]);
            rc = add_file(d, file, (uint32_t)(i - first), err);
        }
    for (int s = 0; s < KVD_DUMP_SIDES; s++)
        free(numbers[s]);
    return rc;
}

static int list_shards(struct kvd_dump *d, const char *path, struct kvd_error *err)
{
    struct dirent **entries;
    int n = scandir(path, &entries, is_shard, alphasort);
    if (n < 0)
        return kvd_fail(err, -errno, "%s: %s", path, strerror(errno));
    int rc = KVD_OK;
    for (int i = 0; i < n; i++) {
        char file[4096];
        snprintf(file, sizeof(file), "%s/%s", path, entries[i]->d_name);
        rc = rc ? rc : add_file(d, file, (uint32_t)i, err);
        free(entries[i]);
    }
    free(entries);
    return rc;
}

// -- tensors -------------------------------------------------------------------------------------

// The place of a layer id, made if it is new. -1: too many layers.
static int layer_index(struct kvd_dump *d, unsigned long id)
{
    uint32_t i = 0;
    while (i < d->n_layers && d->layers[i] < id)
        i++;
    if (i < d->n_layers && d->layers[i] == id)
        return (int)i;
    if (d->n_layers == KVD_MAX_LAYERS || id > KVD_MAX_MODEL_LAYER)
        return -1;
    memmove(&d->layers[i + 1], &d->layers[i], (d->n_layers - i) * sizeof(*d->layers));
    d->layers[i] = (uint16_t)id;
    d->n_layers++;
    for (uint32_t p = 0; p < d->n_pieces; p++)
        d->pieces[p].layer += d->pieces[p].layer >= i;
    return (int)i;
}

static int check_heads(struct kvd_dump *d, uint32_t file, unsigned long layer, int side,
                       uint64_t heads, uint64_t dim, struct kvd_error *err)
{
    const char *path = d->files[file].path;
    if (heads == 0 ||
        heads > (side == KVD_DUMP_Q ? KVD_MAX_KV_HEADS * KVD_MAX_GROUP : KVD_MAX_KV_HEADS) ||
        dim > KVD_MAX_HEAD_DIM || !kvd_head_dim_ok((uint32_t)dim))
        return kvd_fail(
            err, KVD_E_INVALID,
            "%s: layer %lu: %c has %llu heads of %llu; head_dims are " KVD_HEAD_DIM_NAMES, path,
            layer, side_names[side], (unsigned long long)heads, (unsigned long long)dim);
    if (d->dim[side] == 0) {
        d->heads[side] = (uint32_t)heads;
        d->dim[side] = (uint32_t)dim;
    }
    if (d->heads[side] != heads || d->dim[side] != dim)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s: layer %lu: %c has %llu heads of %llu, but %u of %u before: these "
                        "files are not of one model",
                        path, layer, side_names[side], (unsigned long long)heads,
                        (unsigned long long)dim, d->heads[side], d->dim[side]);
    return KVD_OK;
}

// A layer's gradients, or that it has none.
static int add_gradients(struct kvd_dump *d, struct kvd_dump_piece *p, unsigned long id,
                         const struct kvd_safetensor *t, struct kvd_error *err)
{
    const char *path = d->files[p->file[0]].path;
    if (d->n_pieces && d->graded != (t != NULL))
        return kvd_fail(err, KVD_E_INVALID,
                        "%s: layer %lu has %sgradients, unlike those before: all have them (g), "
                        "or none has",
                        path, id, t ? "" : "no ");
    d->graded = t != NULL;
    if (!t)
        return KVD_OK;
    if (t->type > KVD_TENSOR_F32 || t->rank != 3 || t->shape[0] != p->tokens ||
        t->shape[1] != d->heads[KVD_DUMP_Q] || t->shape[2] != d->dim[KVD_DUMP_V])
        return kvd_fail(err, KVD_E_INVALID,
                        "%s: layer %lu: g is not F16, BF16 or F32 [tokens, heads of q, head_dim "
                        "of v]",
                        path, id);
    d->heads[KVD_DUMP_G] = d->heads[KVD_DUMP_Q];
    d->dim[KVD_DUMP_G] = d->dim[KVD_DUMP_V];
    p->file[KVD_DUMP_G] = p->file[0];
    p->type[KVD_DUMP_G] = t->type;
    p->at[KVD_DUMP_G] = t->at;
    return KVD_OK;
}

// One layer of one file, or (`each` is 1) of that and the two behind it. t: its tensors, of which
// the layer is entry `entry`, if `stacked`.
static int add_piece(struct kvd_dump *d, uint32_t first, uint32_t each, unsigned long id,
                     bool stacked, uint64_t entry,
                     const struct kvd_safetensor *const t[KVD_DUMP_TENSORS], struct kvd_error *err)
{
    struct kvd_dump_piece p = {0};
    const char *path = d->files[first].path;
    for (uint32_t s = 0; s < KVD_DUMP_SIDES; s++) {
        uint32_t file = p.file[s] = first + each * s;
        path = d->files[file].path;
        const uint64_t *shape = t[s] ? t[s]->shape + stacked : NULL;
        if (!t[s] || t[s]->type > KVD_TENSOR_F32 || t[s]->rank != 3u + stacked)
            return kvd_fail(
                err, KVD_E_INVALID,
                "%s: layer %lu: %c is missing, or not F16, BF16 or F32 [%stokens, heads, "
                "head_dim]",
                path, id, side_names[s], stacked ? "layers, " : "");
        if (s == 0)
            p.tokens = shape[0];
        if (shape[0] != p.tokens)
            return kvd_fail(err, KVD_E_INVALID, "%s: layer %lu: q has %llu tokens, %c has %llu",
                            path, id, (unsigned long long)p.tokens, side_names[s],
                            (unsigned long long)shape[0]);
        if (check_heads(d, file, id, (int)s, shape[1], shape[2], err))
            return err->code;
        p.type[s] = t[s]->type;
        p.at[s] =
            t[s]->at + entry * shape[0] * shape[1] * shape[2] * kvd_tensor_type_size(p.type[s]);
    }
    if (add_gradients(d, &p, id, t[KVD_DUMP_G], err))
        return err->code;
    int layer = layer_index(d, id);
    struct kvd_dump_piece *pieces = realloc(d->pieces, (d->n_pieces + 1) * sizeof(*pieces));
    if (pieces)
        d->pieces = pieces;
    if (layer < 0 || !pieces)
        return kvd_fail(err, KVD_E_LIMIT, "%s: layer %lu: at most %d layers, ids to %d", path, id,
                        KVD_MAX_LAYERS, KVD_MAX_MODEL_LAYER);
    p.layer = (uint32_t)layer;
    d->pieces[d->n_pieces++] = p;
    return KVD_OK;
}

static int add_stacked(struct kvd_dump *d, uint32_t file, const struct kvd_safetensors *st,
                       struct kvd_error *err)
{
    const struct kvd_safetensor *t[KVD_DUMP_TENSORS] = {0};
    const char *layers = kvd_safetensors_metadata(st, "layers"), *path = d->files[file].path;
    for (int s = 0; s < KVD_DUMP_SIDES; s++)
        t[s] = kvd_safetensors_find(st, (char[]){side_names[s], 0});
    uint64_t n = 0;
    for (const char *c = layers ? layers : ""; *c; n++) {
        char *end;
        unsigned long id = strtoul(c, &end, 10);
        if (end == c || (*end && *end != ','))
            return kvd_fail(err, KVD_E_INVALID, "%s: metadata layers is '%.60s', not a list of ids",
                            path, layers);
        if (!t[0] || n >= t[0]->shape[0])
            break;
        if (add_piece(d, file, 0, id, true, n, t, err))
            return err->code;
        c = *end ? end + 1 : end;
    }
    for (int s = 0; s < KVD_DUMP_SIDES; s++)
        if (n == 0 || !t[s] || t[s]->shape[0] != n)
            return kvd_fail(err, KVD_E_INVALID,
                            "%s: metadata layers does not name as many layers as %c has", path,
                            side_names[s]);
    return KVD_OK;
}

static int add_named(struct kvd_dump *d, uint32_t file, const struct kvd_safetensors *st,
                     struct kvd_error *err)
{
    bool any = false;
    for (uint32_t i = 0; i < st->n; i++) {
        unsigned id;
        char side, name[KVD_TENSOR_NAME];
        if (sscanf(st->tensors[i].name, "layers.%u.%c", &id, &side) != 2 || side != 'q')
            continue;
        const struct kvd_safetensor *t[KVD_DUMP_TENSORS];
        for (int s = 0; s < KVD_DUMP_TENSORS; s++) {
            snprintf(name, sizeof(name), "layers.%u.%c", id, side_names[s]);
            t[s] = kvd_safetensors_find(st, name);
        }
        if (add_piece(d, file, 0, id, false, 0, t, err))
            return err->code;
        any = true;
    }
    return any ? KVD_OK
               : kvd_fail(err, KVD_E_INVALID,
                          "%s: there is neither q, k, v nor layers.<id>.q, .k, .v in it",
                          d->files[file].path);
}

// Gives the pieces of a file, which are d's last ones from `first` on, the windows that its
// metadata has for them.
static int add_windows(struct kvd_dump *d, uint32_t file, uint32_t first, const char *windows,
                       struct kvd_error *err)
{
    for (uint32_t i = first; windows && i < d->n_pieces; i++) {
        unsigned long before = 0, window = 0; // entries of layers with smaller ids
        const char *c = windows;
        char *end = NULL;
        for (uint32_t p = first; p < d->n_pieces; p++)
            before += d->pieces[p].layer < d->pieces[i].layer;
        for (unsigned long n = 0; n < d->n_pieces - first; n++, c = end + 1) {
            unsigned long x = strtoul(c, &end, 10);
            bool last = n + 1 == d->n_pieces - first;
            if (*c < '0' || *c > '9' || x > UINT32_MAX || *end != (last ? '\0' : ','))
                return kvd_fail(err, KVD_E_INVALID,
                                "%s: metadata windows is '%.60s', not a number for each of the "
                                "file's %u layers",
                                d->files[file].path, windows, d->n_pieces - first);
            window = n == before ? x : window;
        }
        d->pieces[i].window = (uint32_t)window;
    }
    return KVD_OK;
}

// Gives the pieces of a file, as above, the position that its tokens begin at.
static int add_first(struct kvd_dump *d, uint32_t file, uint32_t begin, const char *first,
                     struct kvd_error *err)
{
    uint64_t position = 0;
    int read = 0;
    if (first && (*first < '0' || *first > '9' ||
                  sscanf(first, "%15" SCNu64 "%n", &position, &read) != 1 || first[read]))
        return kvd_fail(err, KVD_E_INVALID, "%s: metadata first is '%.60s', no position",
                        d->files[file].path, first);
    for (uint32_t i = begin; i < d->n_pieces; i++)
        d->pieces[i].first = position;
    return KVD_OK;
}

// A zip file or a pickle, as torch.save writes them. The length of a safetensors file's header may
// look like a pickle's first bytes; behind it comes a brace.
static bool is_of_torch(int fd)
{
    uint8_t head[9] = {0};
    return pread(fd, head, sizeof(head), 0) == sizeof(head) && head[8] != '{' &&
           (memcmp(head, "PK\3\4", 4) == 0 || (head[0] == 0x80 && head[1] >= 2 && head[1] <= 5));
}

// Notes what a file is now.
static int look(struct kvd_dump_file *f, int fd, struct kvd_error *err)
{
    struct stat st;
    if (fd < 0 || fstat(fd, &st))
        return kvd_fail(err, -errno, "%s: %s", f->path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return kvd_fail(err, KVD_E_INVALID, "%s: not a regular file", f->path);
    f->size = (uint64_t)st.st_size;
    f->inode = st.st_ino;
    f->device = st.st_dev;
    f->changed_ns = change_time(&st);
    return KVD_OK;
}

static int scan_shard(struct kvd_dump *d, uint32_t file, struct kvd_error *err)
{
    struct kvd_dump_file *f = &d->files[file];
    int fd KVD_CLOSE = open(f->path, O_RDONLY | O_CLOEXEC);
    struct kvd_safetensors t;
    if (look(f, fd, err))
        return err->code;
    if (is_of_torch(fd))
        return kvd_fail(
            err, KVD_E_INVALID,
            "%s: tensors saved by PyTorch do not say which layer and which of q, k and v "
            "they are; " HOW_TO_RECORD,
            f->path);
    if (kvd_safetensors_read(f->path, fd, f->size, &t, err))
        return err->code;
    uint32_t first = d->n_pieces;
    int rc =
        kvd_safetensors_find(&t, "q") ? add_stacked(d, file, &t, err) : add_named(d, file, &t, err);
    if (rc == KVD_OK)
        rc = add_windows(d, file, first, kvd_safetensors_metadata(&t, "windows"), err);
    if (rc == KVD_OK)
        rc = add_first(d, file, first, kvd_safetensors_metadata(&t, "first"), err);
    const char *model = kvd_safetensors_metadata(&t, "model");
    if (rc == KVD_OK && model && *d->model && strcmp(model, d->model) != 0)
        rc = kvd_fail(err, KVD_E_INVALID, "%s: of model %.60s, but the files before of %.60s",
                      f->path, model, d->model);
    if (rc == KVD_OK && model)
        snprintf(d->model, sizeof(d->model), "%s", model);
    kvd_safetensors_free(&t);
    return rc;
}

// A tensor of a .pt file as one of a safetensors file would be. It must be dense and lie within its
// entry.
static int as_safetensor(struct kvd_dump_file *f, const struct kvd_torch *z,
                         struct kvd_safetensor *out, struct kvd_error *err)
{
    static const enum kvd_tensor_type types[] = {[KVD_PICKLE_F32] = KVD_TENSOR_F32,
                                                 [KVD_PICKLE_F16] = KVD_TENSOR_F16,
                                                 [KVD_PICKLE_BF16] = KVD_TENSOR_BF16,
                                                 [KVD_PICKLE_F64] = KVD_TENSOR_F64};
    const struct kvd_pickle_value *t = kvd_pickle_root(z->pickle);
    uint64_t size, n = 1;
    if (t->kind != KVD_PICKLE_TENSOR)
        return kvd_fail(err, KVD_E_CORRUPT, "%s: it is no tensor", f->path);
    if (kvd_torch_storage(z, t, f->entry, err) || kvd_torch_entry_size(z, f->entry, &size, err))
        return err->code;
    out->type = types[t->storage->element];
    out->rank = t->rank;
    uint64_t each = kvd_torch_element_bytes(t->storage->element);
    for (uint32_t i = t->rank; i-- > 0;) {
        if (t->shape[i] < 1 || (t->shape[i] > 1 && t->stride[i] != (int64_t)n) ||
            n > size / (uint64_t)t->shape[i])
            return kvd_fail(err, KVD_E_CORRUPT,
                            "%s: a tensor that is empty, not dense, or beyond its storage",
                            f->path);
        n *= (uint64_t)t->shape[i];
        out->shape[i] = (uint64_t)t->shape[i];
    }
    if (t->offset < 0 || (uint64_t)t->offset > size / each || n > size / each - (uint64_t)t->offset)
        return kvd_fail(err, KVD_E_CORRUPT, "%s: a tensor that is beyond its storage", f->path);
    out->at = (uint64_t)t->offset * each;
    return KVD_OK;
}

// q, k and v of one number.
static int scan_chunk(struct kvd_dump *d, uint32_t file, long layer, struct kvd_error *err)
{
    struct kvd_safetensor own[KVD_DUMP_SIDES] = {0};
    const struct kvd_safetensor *t[KVD_DUMP_TENSORS] = {&own[0], &own[1], &own[2]};
    for (uint32_t s = 0; s < KVD_DUMP_SIDES; s++) {
        struct kvd_dump_file *f = &d->files[file + s];
        int fd KVD_CLOSE = open(f->path, O_RDONLY | O_CLOEXEC);
        struct kvd_torch z = {0};
        if (look(f, fd, err))
            return err->code;
        int rc = kvd_torch_open(&z, f->path, err);
        if (rc == KVD_OK)
            rc = as_safetensor(f, &z, &own[s], err);
        kvd_torch_close(&z);
        if (rc)
            return rc;
    }
    return add_piece(d, file, 1, (unsigned long)layer, false, 0, t, err);
}

static int scan_oscar(struct kvd_dump *d, const char *path, const long *layers, size_t n,
                      struct kvd_error *err)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t file = d->n_files;
        if (list_layer(d, path, layers[i], err))
            return err->code;
        for (; file < d->n_files; file += KVD_DUMP_SIDES)
            if (scan_chunk(d, file, layers[i], err))
                return err->code;
    }
    return KVD_OK;
}

static int scan(struct kvd_dump *d, const char *path, struct kvd_error *err)
{
    struct stat st;
    long *layers KVD_FREE = NULL;
    size_t n = 0;
    if (stat(path, &st))
        return kvd_fail(err, errno == ENOENT ? KVD_E_NOT_FOUND : -errno, "%s: %s", path,
                        strerror(errno));
    int rc = !S_ISDIR(st.st_mode) ? add_file(d, path, 0, err) : list_shards(d, path, err);
    if (rc == KVD_OK && S_ISDIR(st.st_mode))
        rc = list_numbers(path, "layer_", "", &layers, &n, err);
    if (rc)
        return rc;
    if (n && d->n_files)
        return kvd_fail(err, KVD_E_INVALID,
                        "%s: there are *.safetensors files and folders layer_<id> in it: one "
                        "recording or the other is wanted",
                        path);
    if (n)
        return scan_oscar(d, path, layers, n, err);
    if (d->n_files == 0)
        return kvd_fail(err, KVD_E_NOT_FOUND,
                        "%s: there are no *.safetensors files in it; " HOW_TO_RECORD, path);
    for (uint32_t i = 0; i < d->n_files && rc == KVD_OK; i++)
        rc = scan_shard(d, i, err);
    return rc;
}

static int by_layer(const void *a, const void *b)
{
    const struct kvd_dump_piece *x = a, *y = b;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    return x->file[0] < y->file[0] ? -1 : x->file[0] > y->file[0];
}

struct kvd_dump *kvd_dump_open(const char *path, struct kvd_error *err)
{
    struct kvd_dump *d KVD_AUTO(kvd_dump_free) = calloc(1, sizeof(*d));
    if (!d || scan(d, path, err))
        return NULL;
    if (d->heads[KVD_DUMP_K] != d->heads[KVD_DUMP_V] || d->dim[KVD_DUMP_Q] != d->dim[KVD_DUMP_K] ||
        d->heads[KVD_DUMP_Q] % d->heads[KVD_DUMP_K]) {
        kvd_fail(err, KVD_E_INVALID,
                 "%s: q %u heads of %u, k %u of %u, v %u of %u: k and v want the same heads, q a "
                 "multiple of them, and the head_dim of k",
                 path, d->heads[0], d->dim[0], d->heads[1], d->dim[1], d->heads[2], d->dim[2]);
        return NULL;
    }
    qsort(d->pieces, d->n_pieces, sizeof(*d->pieces), by_layer);
    for (uint32_t i = 0; i < d->n_pieces; i++) {
        const struct kvd_dump_piece *p = &d->pieces[i], *last = i ? p - 1 : p;
        d->tokens[p->layer] += p->tokens;
        if (p->layer == last->layer && p->window != last->window) {
            kvd_fail(
                err, KVD_E_INVALID,
                "%s: layer %u: a window of %u, but %u in the files before: these files are not "
                "of one model",
                d->files[p->file[0]].path, d->layers[p->layer], p->window, last->window);
            return NULL;
        }
    }
    return KVD_TAKE(d);
}

// -- reading -------------------------------------------------------------------------------------

// Opens a file of the dump. -1: it is not what it was.
static int reopen(const struct kvd_dump_file *f, struct kvd_error *err)
{
    struct stat st;
    int fd = open(f->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st))
        kvd_fail(err, KVD_E_CORRUPT, "%s: %s, though it was there when the dump was opened",
                 f->path, strerror(errno));
    else if ((uint64_t)st.st_size != f->size || st.st_ino != f->inode || st.st_dev != f->device ||
             change_time(&st) != f->changed_ns)
        kvd_fail(err, KVD_E_CORRUPT, "%s: changed since the dump was opened", f->path);
    else
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

static int read_values(const struct kvd_dump_file *f, uint64_t at, uint64_t bytes, void *to,
                       struct kvd_error *err)
{
    int fd KVD_CLOSE = reopen(f, err);
    if (fd < 0)
        return err->code;
    return f->entry[0] ? kvd_torch_read_at(f->path, KVD_TAKE_FD(fd), f->entry, to, bytes, at, err)
                       : kvd_read_at(f->path, fd, to, bytes, at, err);
}

static int digest_file(const struct kvd_dump_file *f, EVP_MD_CTX *md, void *buffer, size_t size,
                       struct kvd_error *err)
{
    int fd KVD_CLOSE = reopen(f, err);
    if (fd < 0)
        return err->code;
    for (uint64_t at = 0, n; at < f->size; at += n) {
        n = KVD_MIN((uint64_t)size, f->size - at);
        if (kvd_read_at(f->path, fd, buffer, n, at, err))
            return err->code;
        EVP_DigestUpdate(md, buffer, n);
    }
    return KVD_OK;
}

// Of the files of a group, one after the other.
static int digest_group(const struct kvd_dump *d, uint32_t group, EVP_MD_CTX *md, void *buffer,
                        size_t size, char out[DIGITS + 1], struct kvd_error *err)
{
    uint8_t sum[EVP_MAX_MD_SIZE];
    EVP_DigestInit_ex(md, EVP_sha256(), NULL);
    for (uint32_t i = 0; i < d->n_files; i++)
        if (d->files[i].group == group && digest_file(&d->files[i], md, buffer, size, err))
            return err->code;
    EVP_DigestFinal_ex(md, sum, NULL);
    for (int i = 0; i < DIGITS / 2; i++)
        snprintf(out + 2 * (size_t)i, 3, "%02x", sum[i]);
    return KVD_OK;
}

char *kvd_dump_digests(const struct kvd_dump *d, struct kvd_error *err)
{
    enum { AT_ONCE = 1 << 20 };
    void *buffer KVD_FREE = malloc(AT_ONCE);
    char *text KVD_FREE = calloc(d->n_groups, DIGITS + 1);
    EVP_MD_CTX *md = EVP_MD_CTX_new();
    int rc = buffer && text && md ? KVD_OK : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0; rc == KVD_OK && i < d->n_groups; i++) {
        char *at = text + (size_t)i * (DIGITS + 1);
        if (i > 0)
            at[-1] = ',';
        rc = digest_group(d, i, md, buffer, AT_ONCE, at, err);
    }
    EVP_MD_CTX_free(md);
    return rc ? NULL : KVD_TAKE(text);
}

bool kvd_dump_digests_meet(const char *a, const char *b)
{
    char one[DIGITS + 1];
    for (; a && b && *a; a += strcspn(a, ","), a += *a == ',') {
        size_t n = strcspn(a, ",");
        if (n != DIGITS)
            continue;
        snprintf(one, sizeof(one), "%.*s", DIGITS, a);
        if (strstr(b, one))
            return true;
    }
    return false;
}

// `raw` may be the end of `out`: what is overwritten has been read.
static void widen(float *out, const uint8_t *raw, uint64_t n, enum kvd_tensor_type type)
{
    enum { AT_ONCE = 1024 };
    uint16_t narrow[AT_ONCE];
    for (uint64_t i = 0; i < n; i += AT_ONCE) {
        uint64_t m = KVD_MIN((uint64_t)AT_ONCE, n - i);
        memcpy(narrow, raw + 2 * i, 2 * m);
        if (type == KVD_TENSOR_F16)
            for (uint64_t k = 0; k < m; k++)
                out[i + k] = kvd_fp16_to_f32(narrow[k]);
        else
            for (uint64_t k = 0; k < m; k++)
                out[i + k] = kvd_bf16_to_f32(narrow[k]);
    }
}

static bool all_finite(const float *x, uint64_t n)
{
    uint32_t bad = 0;
    for (uint64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof(bits));
        bad |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return !bad;
}

int kvd_dump_read(const struct kvd_dump *d, const struct kvd_dump_piece *p, enum kvd_dump_side side,
                  uint64_t first, uint64_t n, float *out, struct kvd_error *err)
{
    const struct kvd_dump_file *f = &d->files[p->file[side]];
    uint64_t row = (uint64_t)d->heads[side] * d->dim[side], values = n * row;
    uint32_t size = kvd_tensor_type_size(p->type[side]);
    // Narrow values are read into the end of the output and widened from its beginning.
    uint8_t *raw = (uint8_t *)out + values * (sizeof(float) - size);
    if (read_values(f, p->at[side] + first * row * size, values * size, raw, err))
        return err->code;
    if (size == 2)
        widen(out, raw, values, p->type[side]);
    if (all_finite(out, values))
        return KVD_OK;
    for (uint64_t i = 0; i < values; i++)
        if (!isfinite(out[i])) {
            unsigned long long token = first + i / row, head = i % row / d->dim[side];
            return kvd_fail(err, KVD_E_CORRUPT,
                            "%s: layer %u, %c: token %llu, head %llu has NaN or Inf", f->path,
                            d->layers[p->layer], side_names[side], token, head);
        }
    return KVD_OK;
}
