#include "calib/transfer.h"

#include <curl/curl.h>
#include <errno.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdatomic.h>

enum {
    MAX_REDIRECTS = 5,
    SLOW_S = 10,
    SLOW_BYTES = 1024
}; // given up after so long at less a second

static atomic_bool aborted;

void kvd_store_abort(void)
{
    atomic_store(&aborted, true);
}

static bool unwanted(const struct kvd_transfer *t)
{
    return atomic_load(&aborted) || (t->given_up && atomic_load(t->given_up));
}

struct sink {
    struct kvd_transfer *t;
    EVP_MD_CTX *sum;
    uint64_t have;
    int write_errno;
    bool too_large;
};

static size_t on_data(char *data, size_t one, size_t n, void *ctx)
{
    struct sink *s = ctx;
    size_t len = one * n;
    if (s->have + len > s->t->max_bytes) {
        s->too_large = true;
        return 0;
    }
    for (size_t done = 0; done < len;) {
        ssize_t w = write(s->t->fd, data + done, len - done);
        if (w < 0 && errno == EINTR)
            continue;
        if (w <= 0) {
            s->write_errno = w < 0 ? errno : ENOSPC;
            return 0;
        }
        done += (size_t)w;
    }
    EVP_DigestUpdate(s->sum, data, len);
    s->have += len;
    return len;
}

static int on_progress(void *ctx, curl_off_t total, curl_off_t have, curl_off_t up_total,
                       curl_off_t up)
{
    struct sink *s = ctx;
    (void)up_total;
    (void)up;
    if (s->t->progress)
        s->t->progress(s->t->progress_ctx, (uint64_t)have, (uint64_t)total);
    return unwanted(s->t); // curl asks at least once a second
}

static void set_options(CURL *curl, struct kvd_transfer *t, struct sink *s, const char *url)
{
    curl_easy_setopt(curl, CURLOPT_URL, url);
    curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "file,http,https");
    curl_easy_setopt(curl, CURLOPT_REDIR_PROTOCOLS_STR,
                     "http,https"); // a server cannot point us at local files
    curl_easy_setopt(curl, CURLOPT_FOLLOWLOCATION, 1L);
    curl_easy_setopt(curl, CURLOPT_MAXREDIRS, (long)MAX_REDIRECTS);
    curl_easy_setopt(curl, CURLOPT_FAILONERROR, 1L);
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_TIMEOUT_MS, (long)t->timeout_ms);
    curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT_MS, (long)KVD_MIN(t->timeout_ms, 10000u));
    curl_easy_setopt(curl, CURLOPT_LOW_SPEED_LIMIT, (long)SLOW_BYTES);
    curl_easy_setopt(curl, CURLOPT_LOW_SPEED_TIME, (long)SLOW_S);
    curl_easy_setopt(curl, CURLOPT_MAXFILESIZE_LARGE, (curl_off_t)t->max_bytes);
    curl_easy_setopt(curl, CURLOPT_USERAGENT, "kvd/" KVD_VERSION);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, on_data);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, s);
    curl_easy_setopt(curl, CURLOPT_XFERINFOFUNCTION, on_progress);
    curl_easy_setopt(curl, CURLOPT_XFERINFODATA, s);
    curl_easy_setopt(curl, CURLOPT_NOPROGRESS, 0L);
}

static int explain(const struct kvd_transfer *t, const struct sink *s, CURLcode code, long status,
                   struct kvd_error *err)
{
    if (s->write_errno)
        return kvd_fail(err, -s->write_errno, "cannot write to the cache while fetching %s: %s",
                        t->url, strerror(s->write_errno));
    if (code == CURLE_ABORTED_BY_CALLBACK)
        return kvd_fail(err, KVD_E_UNAVAILABLE,
                        "%s: given up, as the process stops or nobody waits for it", t->url);
    if (s->too_large || code == CURLE_FILESIZE_EXCEEDED)
        return kvd_fail(err, KVD_E_LIMIT, "%s is larger than %llu bytes", t->url,
                        (unsigned long long)t->max_bytes);
    if (code == CURLE_FILE_COULDNT_READ_FILE || status == 404 || status == 410)
        return kvd_fail(err, KVD_E_NOT_FOUND, "%s does not exist", t->url);
    if (code == CURLE_UNSUPPORTED_PROTOCOL || code == CURLE_URL_MALFORMAT)
        return kvd_fail(err, KVD_E_INVALID, "%s: stores are file://, http:// or https:// URLs",
                        t->url);
    if (code == CURLE_TOO_MANY_REDIRECTS)
        return kvd_fail(err, KVD_E_UNAVAILABLE, "%s redirects more than %d times", t->url,
                        MAX_REDIRECTS);
    if (code == CURLE_HTTP_RETURNED_ERROR && status < 500)
        return kvd_fail(err, KVD_E_CORRUPT, "%s: the server answered with status %ld", t->url,
                        status);
    if (code == CURLE_HTTP_RETURNED_ERROR)
        return kvd_fail(err, KVD_E_UNAVAILABLE, "%s: the server answered with status %ld", t->url,
                        status);
    return kvd_fail(err, KVD_E_UNAVAILABLE, "%s: %s", t->url, curl_easy_strerror(code));
}

// One try. *again says whether another one could help.
static int attempt(struct kvd_transfer *t, CURL *curl, const char *url, bool *again,
                   struct kvd_error *err)
{
    struct sink s = {.t = t, .sum = EVP_MD_CTX_new()};
    *again = false;
    if (!s.sum || !EVP_DigestInit_ex(s.sum, EVP_sha256(), NULL) || ftruncate(t->fd, 0) ||
        lseek(t->fd, 0, SEEK_SET)) {
        EVP_MD_CTX_free(s.sum);
        return kvd_fail(err, -errno, "%s: cannot prepare the download", t->url);
    }
    set_options(curl, t, &s, url);
    CURLcode code = curl_easy_perform(curl);
    long status = 0;
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
    uint8_t sum[32];
    EVP_DigestFinal_ex(s.sum, sum, NULL);
    EVP_MD_CTX_free(s.sum);
    if (code != CURLE_OK) {
        int rc = explain(t, &s, code, status, err);
        *again = rc == KVD_E_UNAVAILABLE && code != CURLE_TOO_MANY_REDIRECTS;
        return rc;
    }
    memcpy(t->digest, "sha256:", 7);
    kvd_hex(sum, sizeof(sum), t->digest + 7);
    t->bytes = s.have;
    return KVD_OK;
}

static void init_curl(void)
{
    curl_global_init(CURL_GLOBAL_DEFAULT);
}

int kvd_transfer_run(struct kvd_transfer *t, struct kvd_error *err)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, init_curl);
    char file_url[4096];
    const char *url = t->url;
    if (url[0] == '/') {
        snprintf(file_url, sizeof(file_url), "file://%s", url);
        url = file_url;
    }
    CURL *curl = curl_easy_init();
    if (!curl)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    int rc = KVD_OK;
    for (uint32_t i = 0; i <= t->retries; i++) {
        bool again;
        rc = attempt(t, curl, url, &again, err);
        if (!again || unwanted(t))
            break;
        if (i < t->retries)
            usleep(200000u << KVD_MIN(i, 4u));
    }
    curl_easy_cleanup(curl);
    return rc;
}
