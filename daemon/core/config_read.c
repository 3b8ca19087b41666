// Reading one file. inih parses; what it passes over in silence (lines that are no key, a second
// bad line, sections without keys, long lines, indented lines) is found here, as lines go by.
#include <errno.h>
#include <ini.h>
#include <sys/stat.h>

#include "daemon/core/config_load.h"

enum { NO_SECTION, SKIPPED, PLAIN, NAMESPACE }; // of the lines that follow

struct reader {
    struct kvd_config_load *l;
    FILE *file;
    char *text; // the line that inih has
    size_t cap;
    bool wants_key; // it should be a key; inih has not said so yet
    int section;
    const char *name; // of the section
    uint32_t ns;
};

static void new_namespace(struct reader *r, const char *name)
{
    struct kvd_config *c = r->l->c;
    r->section = SKIPPED;
    for (uint32_t i = 0; i < c->n_namespaces; i++) {
        if (strcmp(c->namespaces[i].name, name) != 0)
            continue;
        if (r->l->namespace_section[i].file == r->l->at.file) {
            kvd_config_problem(r->l, r->l->at, "[namespace %s] is on line %u already", name,
                               r->l->namespace_section[i].line);
            return;
        }
        r->l->namespace_section[i] = r->l->at;
        r->section = NAMESPACE;
        r->ns = i;
        return;
    }
    if (!kvd_name_valid(name, KVD_MAX_NAMESPACE)) {
        kvd_config_problem(r->l, r->l->at,
                           "'%.80s' is no namespace's name: it wants 1 to %d printable characters "
                           "without spaces",
                           name, KVD_MAX_NAMESPACE);
        return;
    }
    if (c->n_namespaces == KVD_MAX_CONFIG_NAMESPACES) {
        kvd_config_problem(r->l, r->l->at, "there are more than %d namespaces",
                           KVD_MAX_CONFIG_NAMESPACES);
        return;
    }
    r->section = NAMESPACE;
    r->ns = c->n_namespaces++;
    r->l->namespace_section[r->ns] = r->l->at;
    c->namespaces[r->ns] = (struct kvd_config_namespace){0};
    strcpy(c->namespaces[r->ns].name, name);
}

static void new_section(struct reader *r, char *head)
{
    char *end = strchr(head, ']');
    r->section = SKIPPED;
    if (!end) {
        kvd_config_problem(r->l, r->l->at, "a section ends with ']'");
        return;
    }
    *end = '\0';
    if (strncmp(head, "namespace ", 10) == 0) {
        r->name = "namespace";
        new_namespace(r, head + 10);
    } else if (strcmp(head, "kvd") == 0 || strcmp(head, "tls") == 0) {
        r->name = *head == 'k' ? "kvd" : "tls";
        r->section = PLAIN;
    } else if (strcmp(head, "namespace") == 0) {
        kvd_config_problem(r->l, r->l->at, "a namespace section wants a name: [namespace NAME]");
    } else {
        kvd_config_problem(r->l, r->l->at,
                           "unknown section [%.60s]; there are [kvd], [tls] and [namespace NAME]",
                           head);
    }
}

// The line before this one was neither blank, comment nor section, and inih made no key of it.
static void end_line(struct reader *r)
{
    if (r->wants_key)
        kvd_config_problem(r->l, r->l->at, "neither a [section] nor key = value");
    r->wants_key = false;
}

static char *read_line(char *text, int cap, void *ctx)
{
    struct reader *r = ctx;
    end_line(r);
    ssize_t n = getline(&r->text, &r->cap, r->file);
    if (n < 0)
        return NULL;
    r->l->at.line++;
    const char *start = r->text + strspn(r->text, " \t\r\n");
    bool indented = start > r->text && !strchr("#;[", *start); // the end is in that text, too
    if (r->l->at.line == 1 && strncmp(r->text, "\xef\xbb\xbf", 3) == 0)
        start = r->text + 3; // a byte order mark
    if (!kvd_config_text_valid(r->text, (size_t)n)) {
        kvd_config_problem(r->l, r->l->at,
                           "control characters are not possible, nor what is no UTF-8");
        start = "";
    } else if (*start && !strchr("#;", *start) && n > cap - 2) {
        kvd_config_problem(r->l, r->l->at, "the line is too long: at most %d characters", cap - 2);
        start = "";
    } else if (indented) {
        kvd_config_problem(r->l, r->l->at, "a key is not indented: begin it where the line begins");
        start = "";
    }
    snprintf(text, (size_t)cap, "%s", *start && !strchr("#;", *start) ? r->text : "\n");
    if (*start == '[') {
        char head[256];
        snprintf(head, sizeof(head), "%s", start + 1);
        new_section(r, head);
        snprintf(text, (size_t)cap, "[]\n"); // inih's own sections are not looked at
    } else if (*start && !strchr("#;", *start)) {
        r->wants_key = true;
    }
    return text;
}

static int on_key(void *ctx, const char *section, const char *name, const char *value)
{
    struct reader *r = ctx;
    (void)section; // it is cut off after 49 characters
    r->wants_key = false;
    if (r->section == NO_SECTION)
        kvd_config_problem(r->l, r->l->at, "'%.60s' is in no section; begin with [kvd]", name);
    else if (r->section != SKIPPED)
        kvd_config_set(r->l, r->name, r->ns, name, value);
    return 1;
}

void kvd_config_read(struct kvd_config_load *l, const char *path, bool optional)
{
    struct kvd_place at = {path, 0};
    struct stat st;
    FILE *f KVD_FCLOSE = fopen(path, "re");
    if (!f && optional && errno == ENOENT)
        return;
    if (!f || fstat(fileno(f), &st)) {
        kvd_config_problem(l, at, "%s", strerror(errno));
        return;
    }
    if (S_ISDIR(st.st_mode)) {
        kvd_config_problem(l, at, "is a folder; it wants a file");
        return;
    }
    struct reader r = {.l = l, .file = f};
    l->at = at;
    ini_parse_stream(read_line, &r, on_key, &r);
    end_line(&r);
    if (ferror(f))
        kvd_config_problem(l, at, "cannot be read: %s", strerror(errno));
    free(r.text);
}
