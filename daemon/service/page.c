#include "daemon/service/page.h"

#include "daemon/core/part.h"

char *kvd_metrics_page(struct kvd_daemon *d)
{
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);
    if (!f)
        return NULL;
    for (const struct kvd_part *const *p = d->parts; *p; p++)
        if ((*p)->metrics)
            (*p)->metrics(d, f);
    if (fclose(f)) {
        free(text);
        return NULL;
    }
    return text;
}
