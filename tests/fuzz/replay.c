// Runs a fuzz target over the files of folders: the kept corpus as a test, without libFuzzer.
#include <dirent.h>
#include <errno.h>
#include <string.h>

#include "tests/fuzz/file.h"

static int replay(const char *path)
{
    FILE *f = fopen(path, "rb");
    long size = -1;
    if (f && fseek(f, 0, SEEK_END) == 0 && (size = ftell(f)) >= 0)
        rewind(f);
    // As long as the input: a sanitizer sees what is read beyond.
    uint8_t *data = size >= 0 ? malloc((size_t)size ? (size_t)size : 1) : NULL;
    int bad = !data || fread(data, 1, (size_t)size, f) != (size_t)size;
    if (bad)
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
    else
        LLVMFuzzerTestOneInput(data, (size_t)size);
    free(data);
    if (f)
        fclose(f);
    return bad;
}

int main(int argc, char **argv)
{
    unsigned n = 0;
    int bad = 0;
    for (int i = 1; i < argc; i++) {
        DIR *d = opendir(argv[i]);
        for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d)) {
            char path[4096];
            if (e->d_name[0] == '.')
                continue;
            snprintf(path, sizeof(path), "%s/%s", argv[i], e->d_name);
            bad |= replay(path);
            n++;
        }
        if (d)
            closedir(d);
    }
    printf("%u inputs\n", n);
    return bad || n == 0;
}
