// Writing into a directory store: sets, tags and the index.
#include <errno.h>
#include <sys/stat.h>

#include "calib/safetensors.h"
#include "calib/sign.h"
#include "calib/store_private.h"

// A JSON object of the store; an empty one when there is none yet. NULL: what is there cannot be
// read, and must not be overwritten.
static json_t *load_object(const char *path, struct kvd_error *err)
{
    struct kvd_error local = {0};
    json_t *j = kvd_store_load_json(path, &local);
    if (!j && local.code == KVD_E_NOT_FOUND)
        return json_object();
    if (json_is_object(j))
        return j;
    json_decref(j);
    kvd_fail(err, KVD_E_CORRUPT, "%s", *local.text ? local.text : path);
    return NULL;
}

static int manifest_path(char out[KVD_STORE_PATH], const char *directory, const char *model,
                         struct kvd_error *err)
{
    char name[KVD_MAX_NAME + 16];
    snprintf(name, sizeof(name), "models/%s.json", model);
    return kvd_store_join(out, directory, name, err);
}

static int publish_index(const char *directory, const char *model, struct kvd_error *err)
{
    char path[KVD_STORE_PATH];
    if (kvd_store_join(path, directory, "index.json", err))
        return KVD_E_INVALID;
    json_t *index = load_object(path, err), *at;
    size_t i;
    if (!index)
        return err->code;
    if (!json_is_array(json_object_get(index, "models")))
        json_object_set_new(index, "models", json_array());
    json_t *models = json_object_get(index, "models");
    bool known = false;
    json_array_foreach(models, i, at) known |=
        json_is_string(at) && strcmp(json_string_value(at), model) == 0;
    if (!known)
        json_array_append_new(models, json_string(model));
    int rc = kvd_store_write_json(index, path, err);
    json_decref(index);
    return rc;
}

// Points the tag at the set in a manifest in memory.
static int set_tag(json_t *manifest, const struct kvd_rotset *set,
                   const struct kvd_publish_options *o, uint64_t bytes, struct kvd_error *err)
{
    json_object_set_new(manifest, "model", json_string(o->model));
    if (!json_is_object(json_object_get(manifest, "tags")))
        json_object_set_new(manifest, "tags", json_object());
    json_t *tags = json_object_get(manifest, "tags"), *old = json_object_get(tags, o->tag);
    const char *named = json_string_value(json_object_get(old, "digest"));
    bool same = named && strcmp(named, set->digest) == 0;
    if (old && !same && !o->replace)
        return kvd_fail(err, KVD_E_EXISTS,
                        "%s@%s names %s already, and this set is %s: choose another tag, or "
                        "--replace it",
                        o->model, o->tag, named ? named : "something malformed", set->digest);
    json_t *entry =
        json_pack("{s:s, s:I, s:i, s:i, s:i, s:i, s:s, s:s}", "digest", set->digest, "bytes",
                  (json_int_t)bytes, "layers", (int)set->n_layers, "heads", (int)set->heads,
                  "head_dim_k", (int)set->dim_k, "head_dim_v", (int)set->dim_v, "objective",
                  set->objective, "provenance", set->provenance);
    // What was found of a set stays true of it.
    json_t *evaluation = o->evaluation ? o->evaluation
                         : same        ? json_object_get(old, "evaluation")
                                       : NULL;
    if (evaluation)
        json_object_set(entry, "evaluation", evaluation);
    json_object_set_new(tags, o->tag, entry);
    return KVD_OK;
}

static int publish_signature(const char *directory, const char *digest, const char *key,
                             struct kvd_error *err)
{
    char name[128], path[KVD_STORE_PATH];
    uint8_t signature[KVD_SIGNATURE_BYTES];
    kvd_store_signature_name(name, sizeof(name), digest);
    if (kvd_store_join(path, directory, name, err) || kvd_sign(key, digest, signature, err) ||
        kvd_write_file(path, signature, sizeof(signature), err))
        return err->code;
    return KVD_OK;
}

// Gives the complete file at `incoming` its names. The object first, the manifest after it, the
// index last: a reader never meets a name without its object.
static int place(const char *directory, const struct kvd_rotset *set,
                 const struct kvd_publish_options *o, const char *incoming, struct kvd_error *err)
{
    char name[128], object[KVD_STORE_PATH], path[KVD_STORE_PATH];
    struct stat st;
    kvd_store_object_name(name, sizeof(name), set->digest);
    if (kvd_store_join(object, directory, name, err) ||
        manifest_path(path, directory, o->model, err) || kvd_store_make_parents(path, err))
        return err->code;
    if (stat(incoming, &st))
        return kvd_fail(err, -errno, "%s: %s", incoming, strerror(errno));
    json_t *manifest = load_object(path, err);
    int rc = manifest ? set_tag(manifest, set, o, (uint64_t)st.st_size, err) : err->code;
    if (rc == KVD_OK && rename(incoming, object))
        rc = kvd_fail(err, -errno, "%s: %s", object, strerror(errno));
    if (rc == KVD_OK && o->key)
        rc = publish_signature(directory, set->digest, o->key, err);
    if (rc == KVD_OK)
        rc = kvd_store_write_json(manifest, path, err);
    json_decref(manifest);
    return rc ? rc : publish_index(directory, o->model, err);
}

int kvd_store_publish(const char *directory, struct kvd_rotset *set,
                      const struct kvd_publish_options *o, struct kvd_error *err)
{
    char incoming[KVD_STORE_PATH], ref[2 * KVD_MAX_NAME + 2];
    if (snprintf(ref, sizeof(ref), "%s@%s", o->model, o->tag) >= (int)sizeof(ref) ||
        kvd_digest_valid(ref) || !kvd_store_ref_valid(ref))
        return kvd_fail(err, KVD_E_INVALID,
                        "%.100s@%.100s: models and tags have letters, digits, '.', '_', '-'",
                        o->model, o->tag);
    int rc = kvd_rotset_check(set, NULL, err);
    if (rc)
        return rc;
    if (kvd_store_join(incoming, directory, "objects/sha256/incoming", err) ||
        kvd_store_make_parents(incoming, err))
        return err->code;
    int lock KVD_CLOSE = kvd_store_lock(directory, err);
    if (lock < 0)
        return lock;
    rc = o->file && *set->digest ? kvd_rotset_copy(o->file, set->digest, incoming, err)
                                 : kvd_rotset_write(set, incoming, err);
    if (rc)
        return rc;
    rc = place(directory, set, o, incoming, err);
    if (rc)
        unlink(incoming);
    return rc;
}

int kvd_store_untag(const char *directory, const char *ref, char digest[KVD_DIGEST_TEXT],
                    struct kvd_error *err)
{
    char model[KVD_MAX_NAME + 1], path[KVD_STORE_PATH];
    const char *at = strchr(ref, '@');
    if (!at || !kvd_store_ref_valid(ref))
        return kvd_fail(err, KVD_E_INVALID, "%.200s is no tag: say model@tag", ref);
    snprintf(model, sizeof(model), "%.*s", (int)(at - ref), ref);
    if (manifest_path(path, directory, model, err))
        return err->code;
    struct kvd_error local = {0};
    int lock KVD_CLOSE = kvd_store_lock(directory, &local);
    json_t *manifest = lock >= 0 ? kvd_store_load_json(path, &local) : NULL;
    if (!manifest)
        return local.code == KVD_E_NOT_FOUND || local.code == -ENOENT
                   ? kvd_fail(err, KVD_E_NOT_FOUND, "%s has no model %s", directory, model)
                   : kvd_fail(err, local.code, "%s", local.text);
    json_t *tags = json_object_get(manifest, "tags"), *entry = json_object_get(tags, at + 1);
    const char *named = json_string_value(json_object_get(entry, "digest"));
    snprintf(digest, KVD_DIGEST_TEXT, "%s", named ? named : "");
    int rc = entry ? KVD_OK
                   : kvd_fail(err, KVD_E_NOT_FOUND, "model %s has no tag %s in %s", model, at + 1,
                              directory);
    if (rc == KVD_OK) {
        json_object_del(tags, at + 1);
        rc = kvd_store_write_json(manifest, path, err);
    }
    json_decref(manifest);
    return rc;
}
