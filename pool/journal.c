// The journal: what the truth was before a change that takes more than one store.
#include "pool/internal.h"

#include <assert.h>

static_assert(sizeof(struct region_journal) == 4096, "a page");
// The largest changes: of where a sequence is; of a name that goes from one to another.
static_assert(STATE_BYTES + 2 * sizeof(struct region_note) + KVD_MAX_NAME * 4 < KVD_JOURNAL_BYTES,
              "changes fit");

static uint64_t padded(uint64_t length)
{
    return kvd_round_up(length, sizeof(uint64_t));
}

void journal_note(struct kvd_pool *pool, const void *at, size_t length)
{
    struct region_journal *j = pool->journal;
    struct region_note note = {(uint64_t)((const uint8_t *)at - (uint8_t *)pool->head), length};
    memcpy(j->data + j->bytes, at, length);
    memcpy(j->data + j->bytes + padded(length), &note, sizeof(note));
    stored();
    j->bytes += padded(length) + sizeof(note);
    stored();
}

void journal_end(struct kvd_pool *pool)
{
    stored();
    pool->journal->bytes = 0;
    stored();
}

// A note may be put back more than once, so this may end at any instant too.
int journal_undo(struct kvd_pool *pool, struct kvd_error *err)
{
    struct region_journal *j = pool->journal;
    uint64_t first = (uint64_t)((uint8_t *)pool->ns - (uint8_t *)pool->head);
    uint64_t bytes = j->bytes;
    while (bytes > 0) {
        struct region_note note;
        if (bytes > sizeof(j->data) || bytes < sizeof(note))
            return kvd_fail(err, KVD_E_CORRUPT, "the journal has %llu bytes",
                            (unsigned long long)bytes);
        bytes -= sizeof(note);
        memcpy(&note, j->data + bytes, sizeof(note));
        if (note.length > bytes || padded(note.length) > bytes || note.at < first ||
            note.at > pool->head->region_bytes || note.length > pool->head->region_bytes - note.at)
            return kvd_fail(err, KVD_E_CORRUPT, "the journal notes %llu bytes at %llu",
                            (unsigned long long)note.length, (unsigned long long)note.at);
        bytes -= padded(note.length);
        memcpy((uint8_t *)pool->head + note.at, j->data + bytes, note.length);
    }
    journal_end(pool);
    return KVD_OK;
}
