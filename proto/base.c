#include "proto/base.h"

#include "proto/kvd_limits.h"

#include <ctype.h>
#include <math.h>

int kvd_fail(struct kvd_error *e, int code, const char *fmt, ...)
{
    if (!e)
        return code;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(e->text, sizeof(e->text), fmt, ap);
    va_end(ap);
    e->code = code;
    return code;
}

int kvd_fail_in(struct kvd_error *e, const char *fmt, ...)
{
    if (!e)
        return KVD_E_INTERNAL;
    char old[sizeof(e->text)];
    memcpy(old, e->text, sizeof(old));
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(e->text, sizeof(e->text), fmt, ap);
    va_end(ap);
    if (n >= 0 && (size_t)n + 3 < sizeof(e->text)) {
        int room = (int)(sizeof(e->text) - (size_t)n - 3);
        snprintf(e->text + n, sizeof(e->text) - (size_t)n, ": %.*s", room, old);
    }
    return e->code;
}

const char *kvd_status_name(int code)
{
    static const char *const names[] = {
        [KVD_OK] = "ok",
        [KVD_E_INVALID] = "invalid argument",
        [KVD_E_NOT_FOUND] = "not found",
        [KVD_E_EXISTS] = "already exists",
        [KVD_E_PRECONDITION] = "failed precondition",
        [KVD_E_QUOTA] = "quota exceeded",
        [KVD_E_FULL] = "pool full",
        [KVD_E_LIMIT] = "limit exceeded",
        [KVD_E_DENIED] = "permission denied",
        [KVD_E_UNAUTH] = "unauthenticated",
        [KVD_E_UNAVAILABLE] = "unavailable",
        [KVD_E_CORRUPT] = "data loss",
        [KVD_E_UNSUPPORTED] = "unsupported",
        [KVD_E_TIMEOUT] = "timed out",
        [KVD_E_LOST] = "connection lost",
        [KVD_E_INTERNAL] = "internal error",
    };
    if (code < 0)
        return strerror(-code);
    return (size_t)code < KVD_LEN(names) ? names[code] : "unknown status";
}

static const struct {
    const char *name, *transform;
} codecs[KVD_CODEC_COUNT] = {
#define KVD_CODEC(id, number, name, bits, param_bytes, levels, kernel, transform)                  \
    [KVD_CODEC_##id] = {name, transform},
#include "proto/codecs.def"
};

const char *kvd_codec_name(uint32_t codec)
{
    return codec < KVD_CODEC_COUNT ? codecs[codec].name : "unknown";
}

const char *kvd_codec_transform(uint32_t codec)
{
    return codec < KVD_CODEC_COUNT ? codecs[codec].transform : "";
}

uint32_t kvd_codec_find(const char *name)
{
    uint32_t i = 0;
    while (i < KVD_CODEC_COUNT && strcmp(name, codecs[i].name) != 0)
        i++;
    return i;
}

const char *kvd_codec_names(void)
{
    static const char names[] =
#define KVD_CODEC(id, number, name, ...) ", " name
#include "proto/codecs.def"
        ;
    return names + 2;
}

const char *kvd_codecs_name(struct kvd_codecs c, char text[KVD_CODECS_TEXT])
{
    if (c.k == c.v)
        snprintf(text, KVD_CODECS_TEXT, "%s", kvd_codec_name(c.k));
    else
        snprintf(text, KVD_CODECS_TEXT, "k=%s,v=%s", kvd_codec_name(c.k), kvd_codec_name(c.v));
    return text;
}

bool kvd_codecs_find(const char *text, struct kvd_codecs *out)
{
    struct kvd_codecs c = kvd_codecs_both(kvd_codec_find(text));
    if (c.k == KVD_CODEC_COUNT) {
        char name[2][KVD_CODECS_TEXT];
        const char *comma = strchr(text, ',');
        if (!comma || (size_t)(comma - text) >= sizeof(name[0]) ||
            strlen(comma + 1) >= sizeof(name[1]))
            return false;
        snprintf(name[0], sizeof(name[0]), "%.*s", (int)(comma - text), text);
        snprintf(name[1], sizeof(name[1]), "%s", comma + 1);
        bool swapped = name[0][0] == 'v';
        const char *k = name[swapped], *v = name[!swapped];
        if (strncmp(k, "k=", 2) != 0 || strncmp(v, "v=", 2) != 0)
            return false;
        c = (struct kvd_codecs){kvd_codec_find(k + 2), kvd_codec_find(v + 2)};
    }
    if (c.k == KVD_CODEC_COUNT || c.v == KVD_CODEC_COUNT)
        return false;
    *out = c;
    return true;
}

void kvd_hex(const void *in, size_t len, char *out)
{
    static const char digits[] = "0123456789abcdef";
    const uint8_t *p = in;
    for (size_t i = 0; i < len; i++) {
        out[2 * i] = digits[p[i] >> 4];
        out[2 * i + 1] = digits[p[i] & 15];
    }
    out[2 * len] = '\0';
}

int kvd_parse_size(const char *text, uint64_t *out)
{
    static const char units[] = "KMGT";
    if (!isdigit((unsigned char)text[0]))
        return KVD_E_INVALID;
    char *end, digits[32];
    size_t n = strspn(text, "0123456789.");
    if (n >= sizeof(digits))
        return KVD_E_INVALID;
    memcpy(digits, text, n); // strtod would take 0x10 and 1e3 too
    digits[n] = '\0';
    double value = strtod(digits, &end);
    double factor = 1;
    if (*end)
        return KVD_E_INVALID;
    end = (char *)text + n;
    if (*end == ' ')
        end++;
    if (*end) {
        const char *unit = strchr(units, toupper((unsigned char)*end));
        if (!unit)
            return KVD_E_INVALID;
        factor = pow(1024, (double)(unit - units + 1));
        end++;
        if (strcmp(end, "iB") != 0 && strcmp(end, "") != 0)
            return KVD_E_INVALID;
    }
    value *= factor;
    if (!isfinite(value) || value >= 9e18)
        return KVD_E_INVALID;
    *out = (uint64_t)value;
    return KVD_OK;
}

const char *kvd_format_size(uint64_t bytes, char *out, size_t cap)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    size_t u = 0;
    while (value >= 1024 && u + 1 < KVD_LEN(units)) {
        value /= 1024;
        u++;
    }
    if (u == 0)
        snprintf(out, cap, "%u B", (unsigned)bytes);
    else
        snprintf(out, cap, "%.*f %s", value < 10 ? 2 : value < 100 ? 1 : 0, value, units[u]);
    return out;
}

bool kvd_name_valid(const char *name, size_t max)
{
    size_t n = strlen(name);
    if (n == 0 || n > max)
        return false;
    for (size_t i = 0; i < n; i++)
        if (name[i] <= ' ' || name[i] > '~')
            return false;
    return true;
}
