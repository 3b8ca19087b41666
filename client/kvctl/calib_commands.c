// Commands that kvctl knows and kvctl-calib runs.
#include "client/kvctl/kvctl.h"

const struct command kvctl_fit = {
    .name = "calib fit",
    .help = "Fit a rotation set to recorded activations",
    .more =
        "DUMP is a safetensors file or a directory of them, with q, k and v after RoPE as [layers, "
        "tokens, heads, head_dim] and metadata layers, or layers.<id>.q, .k and .v as [tokens, "
        "heads, head_dim].",
    .arguments = {{"DUMP", VALUE_TEXT}, {"OUT", VALUE_TEXT}},
    .required = 2,
    .options =
        {{"objective-k", 'k', "NAME", VALUE_TEXT, "ktk (default), qqt or hadamard"},
         {"objective-v", 'v', "NAME", VALUE_TEXT, "vtv (default), sst or hadamard"},
         {"compose", 0, "NAME", VALUE_TEXT, "top_h (default), r_h_pbr, r_h or r"},
         {"per-layer", 0, NULL, VALUE_NONE, "A rotation for each layer, not one for each kv head"},
         {"scales", 0, "K,V", VALUE_SCALES,
          "published, least-squares or unbiased (default: unbiased,least-squares)"},
         {"published", 0, NULL, VALUE_NONE,
          "OSCAR's recipe: -k qqt -v sst --compose r_h_pbr --per-layer --scales "
          "published,published, but for what other options say"},
         {"clip", 0, "K,V", VALUE_TEXT, "Clip ratios of published scales (default: 0.96,0.92)"},
         {"fit-clips", 0, "DUMP", VALUE_TEXT,
          "Choose these, and level gains, by the output error on these activations"},
         {"codec", 0, "NAME", VALUE_TEXT, "tc2 or tc2.5: fit transforms for it, not rotations"},
         {"bits", 0, "HOW", VALUE_TEXT,
          "Of K's tiles in these: greedy (default), as each kv head wants them, or quarters: "
          "4-2-1-1 or 4-3-2-1"},
         {"context", 0, "TOKENS", VALUE_NUMBER,
          "Of --fit-clips's, attended at a time (default: 2048)"},
         {"marks", 0, "MARKS", VALUE_TEXT,
          "Layers that get a codec of their own in sessions that name the set: LAYER=CODEC, "
          "with + between, such as 18=tc2.5+23=int4"},
         {"sensitive", 0, "N=CODEC", VALUE_TEXT,
          "Mark so many layers, those whose errors move the answers' loss most where --asked asks"},
         {"asked", 0, "DUMP", VALUE_TEXT,
          "Prompts that end by asking for what they told, a file each, as kvd.record --asked makes "
          "them: --codec's transforms go by what their answers depend on, too"},
         {"layers", 0, "LIST", VALUE_LAYERS,
          "Model layer ids, such as 0-35 or 3,7,11 (default: all)"},
         {"model", 0, "NAME", VALUE_TEXT, "Name of the model (default: what the dump says)"},
         {"threads", 0, "N", VALUE_COUNT, "Default: as many as there are cores"},
         {"state", 0, "DIR", VALUE_TEXT,
          "Keep finished layers there; the same command goes on with them"},
         {"spectrum", 0, "FILE", VALUE_TEXT, "Also write covariances and eigenvalues (F64)"}},
    .run = cmd_calib_fit,
};

const struct command kvctl_eval = {
    .name = "calib eval",
    .help = "What sets and codecs cost on activations",
    .more =
        "On activations that the sets (files) were not fitted to: each set with int2, int2c and "
        "int2-lm, and with int2 at the published clip ratios; beside them naive int2 (no "
        "rotation), the Hadamard matrix, and TurboQuant; a set of transforms with its own codec. "
        "Errors are of attention's outputs against "
        "those over the recorded keys and values; logit error is a root mean square, bias the mean "
        "error of a query's logit at the compressed key that it looks for most, KL in nats.",
    .arguments = {{"DUMP", VALUE_TEXT}, {"SET", VALUE_TEXT}},
    .required = 1,
    .repeats = true,
    .options =
        {{"context", 'c', "TOKENS", VALUE_NUMBER, "Tokens attended at a time (default: 2048)"},
         {"queries", 'q', "N", VALUE_NUMBER, "Last positions of a context that ask (default: 64)"},
         {"contexts", 0, "N", VALUE_NUMBER, "At most so many a layer (default: all)"},
         {"sink", 0, "TOKENS", VALUE_NUMBER, "Kept in bf16 at the beginning (default: 64)"},
         {"recent", 0, "TOKENS", VALUE_NUMBER, "Kept in bf16 at the end (default: 256)"},
         {"codecs", 0, "LIST", VALUE_TEXT,
          "Only these, separated by commas (default: all there are)"},
         {"scales", 0, NULL, VALUE_NONE,
          "Each with published, least-squares and unbiased scales, not the set's own alone"},
         {"threads", 0, "N", VALUE_COUNT, "Default: as many as there are cores"},
         {"html", 0, "FILE", VALUE_TEXT, "Also write a report, one file that needs no other"}},
    .run = cmd_calib_eval,
};
