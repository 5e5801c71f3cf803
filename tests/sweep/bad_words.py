"""Bad words for every verb: flags and files that are not there, values that their flags refuse, flags that disagree."""

from collections.abc import Iterator

from tests.sweep.sweep_cases import Case

LONG = "x" * 5000
# what a flag that wants a whole number above 0 must refuse
NUMBERS = ("0", "-1", "1.5", "many", "", "nan", "1e3", "²", str(10**30))
# places where nothing can be written: a folder that is not there, a folder, a file as a folder
PLACES = ("nowhere/out", "folder", "text.txt/out", "/dev/null/out", "")
# files that are not there, are no files, or are no text
FILES = ("nowhere.txt", "folder", "binary.bin", "", "text.txt/nowhere", "größe✓.txt", "a\udcffb.txt", LONG)

TRAIN = ("train", "tiny.yaml")
TOKENS = ("train", "tiny.yaml", "--data.path", "tokens")
PIPE = (*TRAIN, "--mesh.pipe", "2", "--model.num_layers", "2", "--train.microbatches", "2")
CURATE = ("curate", "curation.yaml")
PLAN = ("plan", "tiny.yaml")
EVALUATE = ("evaluate", "run", "--text", "text.txt")
GENERATE = ("generate", "run", "--prompt", "a")
SERVE = ("serve", "run")
UPCYCLE = ("convert", "upcycle", "run", "--output", "new")
TOKENIZE = ("preprocess", "--input", "documents.jsonl", "--tokenizer", "bytes", "--output", "out", "--workers", "1")
MERGE = ("preprocess", "merge", "--input", "tokens", "--output", "out")
INSPECT = ("preprocess", "inspect", "tokens")
ORDER = (
    *("preprocess", "order", "tokens", "--sequence-length", "8", "--samples", "10"),
    *("--seed", "1", "--split", "1,0,0"),
)

# Values of each text setting that cannot be meant, after a line on which it has an effect. Every text setting of a
# run and of a curation must be here.
TEXTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "model.pattern": (TRAIN, ("", "*+", "(*", "(*)", "|", "*-|", "größe", "* -", "(**)", ")", LONG)),
    "model.family": (TRAIN, ("", "decode", "..", ".", "a..b", "a b", "os", "jaxtron.models.decoder.config", LONG)),
    "data.path": (TRAIN, (*FILES, "latin.txt", "empty.txt", "/dev/null", "tokens.idx.txt", "gs:/x")),
    "data.train": (("train", "no_data.yaml"), (*FILES, "text.txt", "documents.jsonl")),
    "data.validation": (("train", "no_data.yaml", "--data.train", "tokens"), FILES),
    "data.test": (("train", "no_data.yaml", "--data.train", "tokens"), FILES),
    "data.split": (TOKENS, ("", "a,b", "0,0,0", "-1,2,3", "1,2,3,4", "nan,1,1", "0,1,1", "inf,1,1", "1e400,1,1", LONG)),
    "data.tokenizer": (TRAIN, (*FILES, "byte", "cl100k_bas", "text.txt", "x.model", "x.tiktoken", "text.tiktoken:x")),
    "data.end_of_document": (TRAIN, ("", "</s>", LONG)),
    "data.chat.template": (("train", "tiny.yaml", "--data.format", "chat", "--data.path", "chat.jsonl"), FILES),
    "data.cache_directory": (TRAIN, ("", "text.txt", "text.txt/out", "/dev/null/out", LONG)),
    "checkpoint.initialize_from": (TRAIN, ("", "nowhere", "text.txt", "/dev/null", "text.txt/out", LONG)),
    "checkpoint.allow_missing": (TRAIN, ("", "head.*", LONG)),
    "checkpoint.allow_unused": (TRAIN, ("", "head.*", LONG)),
    "checkpoint.initialize_adapters": (TRAIN, ("", "nowhere", "text.txt", LONG)),
    "checkpoint.memory_directory": (
        (*TRAIN, "--checkpoint.memory_every", "1"),
        ("", "text.txt", "text.txt/out", "/dev/null/out", LONG),
    ),
    "checkpoint.local_directory": (
        (*TRAIN, "--checkpoint.local_every", "1"),
        ("", "text.txt", "text.txt/out", "/dev/null/out", LONG),
    ),
    "train.trainable": (TRAIN, ("!", "!*", "head.*", "embedding", "stack.periods.layers.7.*", LONG)),
    "train.lora.targets": ((*TRAIN, "--train.lora.rank", "2"), ("", "q_proj", "head.*", "attention", LONG)),
    "pipeline.schedule": (PIPE, ("", "gpip", "GPIPE", "nowhere.csv", "folder.csv", "binary.csv", ".csv", LONG)),
    "run.directory": (TRAIN, ("", "text.txt", "text.txt/out", "/dev/null/out", "a*b", "a[b]", "a\udcffb", LONG)),
    "run.wandb_project": (TRAIN, ("", "mine", LONG)),
    "runtime.coordinator_address": (
        (*TRAIN, "--runtime.num_processes", "2", "--runtime.process_id", "0"),
        ("", "node", ":", ":1", "node:", "node:port", "a b:1", "node:99999", "node:-1", LONG),
    ),
    "runtime.xla_flags": (TRAIN, ("xla_a=1", "--xla_a 'b", "-x", LONG)),
    "runtime.compilation_cache": (TRAIN, ("", "text.txt", "text.txt/out", "/dev/null/out", LONG)),
    "output": (CURATE, ("", "text.txt", "text.txt/out", "/dev/null/out", "folder_with_file", LONG)),
    "text_field": (CURATE, ("", "nowhere", LONG)),
    "id_field": (CURATE, ("",)),
    "ray_address": (CURATE, ("", "nowhere:1")),
}
NO_NUMBERS = ("many", "nan", "inf", "-inf", "", "1e400")
NO_NATURALS = ("-1", "1.5", "many", "", "nan", str(10**30))
# of commands that make text
MODEL_FLAGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("--rows", "--room"), NUMBERS),
    "--step": NO_NATURALS,
    "--chat_template": FILES,
}
# Bad values of each flag that is no setting, after a good line. Every flag that a command's help shows must be here.
FLAGS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "plan": (
        PLAN,
        {
            "--gpu": ("", "h10", "H100 SXM", "nowhere.textproto", "folder.textproto", "binary.textproto", LONG),
            "--nodes": NUMBERS,
            "--gpus": NUMBERS,
            "--gpus-per-node": NUMBERS,
            "--tokens": ("0", "-1", "many", "nan", "inf", "-inf", "", "1e400"),
            "--json": PLACES,
            "--hlo": PLACES,
            "--compare": FILES,
            "--machine": (*FILES, "tiny.yaml", "empty.yaml"),
            "--calibrate": FILES,
            "--top": NUMBERS,
            "--png": PLACES,
            "--csv": PLACES,
        },
    ),
    "evaluate": (
        EVALUATE,
        {
            "--text": (*FILES, "latin.txt", "empty.txt"),
            "--stride": (*NUMBERS, "33"),
            "--batch": NUMBERS,
            "--step": ("-1", "1.5", "many", "", "nan", "5", str(10**30)),
            "--detokenize": ("", "wikitex", LONG),
            "--json": PLACES,
        },
    ),
    "generate": (
        GENERATE,
        {
            "--prompt": ("",),
            "--prompts": FILES,
            "--system": ("", "x"),
            "--samples": NUMBERS,
            "--json": PLACES,
            **MODEL_FLAGS,
            **dict.fromkeys(("--temperature", "--top_p", "--min_p"), (*NO_NUMBERS, "-0.1", "101")),
            **dict.fromkeys(("--typical_p", "--repetition_penalty"), (*NO_NUMBERS, "0", "101")),
            **dict.fromkeys(("--presence_penalty", "--frequency_penalty"), (*NO_NUMBERS, "-3", "3")),
            **dict.fromkeys(("--top_k", "--no_repeat_ngram_size", "--min_new_tokens"), NO_NATURALS),
            "--max_new_tokens": NUMBERS,
            "--stop": ("",),
            "--stop_token_ids": NO_NATURALS,
            "--seed": ("1.5", "many", "", "nan", str(10**30)),
            "--logit_bias": ("", "x", "5", "5=", "=5", "5=nan", "5=101", "-1=2"),
            "--logprobs": (*NO_NATURALS, "21", "2"),
        },
    ),
    "serve": (
        SERVE,
        {
            "--host": ("",),
            "--port": (*NO_NATURALS, "65536"),
            "--name": ("",),
            "--api_key_file": (*FILES, "empty.txt", "text.txt"),
            **MODEL_FLAGS,
            **dict.fromkeys(("--body_limit", "--prompt_limit", "--token_limit", "--queue_limit"), NUMBERS),
            "--time_limit": (*NO_NUMBERS, "0", "-1"),
        },
    ),
    "upcycle": (
        UPCYCLE,
        {
            "--output": ("folder_with_file", "text.txt", ""),
            "--experts": NUMBERS,
            "--granularity": NUMBERS,
            "--top_k": (*NUMBERS, "9"),
            "--scores": ("", "sigmoid", LONG),
            "--router_std": ("0", "-1", "many", "nan", "inf", "", "1e400"),
            "--step": ("-1", "1.5", "many", "", "nan", str(10**30)),
        },
    ),
    "preprocess": (
        TOKENIZE,
        {
            "--input": FILES,
            "--tokenizer": (*FILES, "byte", "characters", "text.txt"),
            "--end-of-document": ("", "</s>"),
            "--output": PLACES,
            "--json-key": ("", "nowhere", LONG),
            "--workers": NUMBERS,
            "--language": ("", "en", LONG),
        },
    ),
    "merge": (MERGE, {"--input": (*FILES, "text.txt"), "--output": PLACES}),
    "inspect": (INSPECT, {"--tokenizer": (*FILES, "byte", "characters"), "--tokens": NUMBERS}),
    "order": (
        ORDER,
        {
            "--sequence-length": NUMBERS,
            "--samples": ("-1", "1.5", "many", "", "nan", str(10**30)),
            "--seed": ("-1", "1.5", "many", "", "nan", str(10**30)),
            "--split": ("", "a,b", "0,0,0", "-1,2,3", "1,2,3,4", "0,1,1"),
        },
    ),
}
# which of the planner's flags want which kind of request
KIND_FLAGS = {
    "--csv": ("--schedule", "--mesh.pipe", "2", "--mesh.data", "1"),
    "--png": ("--schedule", "--mesh.pipe", "2", "--mesh.data", "1"),
    "--top": ("--search", "--gpu", "h100", "--gpus", "8"),
    "--gpu": (),
}
# flags that are in the good line, at its end
ALONE = (("evaluate", "--text"), ("upcycle", "--output"), ("generate", "--prompt"))
# whole lines, and what their error must name
LINES: tuple[tuple[str, str], ...] = (
    ("trian", "'trian'"),
    ("TRAIN", "'TRAIN'"),
    ("--nowhere", "'--nowhere'"),
    ("-x", "'-x'"),
    ("größe✓", "'größe✓'"),
    ("train tiny.yaml tiny.yaml", "'tiny.yaml'"),
    ("train nowhere.yaml", "nowhere.yaml"),
    ("train folder", "folder"),
    ("train text.txt", "text.txt"),
    ("train binary.bin", "binary.bin"),
    ("train empty.txt --data.path nowhere.txt", "nowhere.txt"),
    ("train tiny.yaml -x", "-x"),
    ("train tiny.yaml -- --seed 1", "--"),
    ("train tiny.yaml --seed 1 2", "2"),
    ("train tiny.yaml --seed= 1", "1"),
    ("train tiny.yaml --=1", "--"),
    ("train tiny.yaml --model 7", "model"),
    ("train tiny.yaml --model.rotary.scaling.factor.x 7", "model.rotary.scaling.factor.x"),
    ("train tiny.yaml --seed.x 7", "seed.x"),
    ("train tiny.yaml --.seed 7", ".seed"),
    ("train tiny.yaml --seed. 7", "seed."),
    ("train tiny.yaml --extends tiny.yaml", "extends"),
    ("plan tiny.yaml", "--gpu"),
    ("plan tiny.yaml --search", "--gpu"),
    ("plan tiny.yaml --layout --schedule", "--schedule"),
    ("plan tiny.yaml --layout --search --gpu h100", "--search"),
    ("plan tiny.yaml --layout --gpu h100", "--gpu"),
    ("plan tiny.yaml --layout --json out.json", "--json"),
    ("plan tiny.yaml --schedule --top 3", "--top"),
    ("plan tiny.yaml --gpu h100 --top 3", "--top"),
    ("plan tiny.yaml --gpu h100 --csv out.csv", "--csv"),
    ("plan tiny.yaml --gpu h100 --nodes 1 --gpus 8", "--gpus"),
    ("plan tiny.yaml --gpu h100 --nowhere 1", "nowhere"),
    ("plan tiny.yaml --gpu", "--gpu"),
    ("plan tiny.yaml --gpu h100 --gpus 12 --gpus-per-node 8", "--gpus"),
    ("plan nowhere.yaml --layout", "nowhere.yaml"),
    ("plan tiny.yaml tiny.yaml --layout", "tiny.yaml"),
    ("plan tiny.yaml --layout --mesh.tensor 3", "mesh.tensor"),
    ("plan tiny.yaml --schedule --mesh.pipe 3 --mesh.data 1", "mesh.pipe"),
    ("evaluate run", "--text"),
    ("evaluate nowhere --text text.txt", "nowhere"),
    ("evaluate folder --text text.txt", "folder"),
    ("evaluate text.txt --text text.txt", "text.txt"),
    ("evaluate run run --text text.txt", "run"),
    ("evaluate run --text", "--text"),
    ("evaluate run --text text.txt --nowhere 1", "nowhere"),
    ("evaluate run --text text.txt --seed 1", "--seed"),
    ("evaluate run --text text.txt --model.hidden_size 64", "--model.hidden_size"),
    ("evaluate run --text text.txt --data.sequence_length 64", "data.sequence_length"),
    ("evaluate run --text text.txt --data.sequence_length 0", "data.sequence_length"),
    ("evaluate run --text text.txt --mesh.tensor 3", "mesh.tensor"),
    ("evaluate run --text text.txt --mesh.data 16", "mesh.data"),
    ("generate run", "--prompt"),
    ("generate nowhere --prompt a", "nowhere"),
    ("generate folder --prompt a", "folder"),
    ("generate run run --prompt a", "run"),
    ("generate run --prompt a --model.hidden_size 64", "--model.hidden_size"),
    ("generate run --prompt a --pipeline.chunks 2", "--pipeline.chunks"),
    ("generate run --prompt a --mesh.tensor 3", "mesh.tensor"),
    ("generate run --prompt a --min_new_tokens 5 --max_new_tokens 3", "min_new_tokens"),
    ("generate run --chat --samples 2", "--samples"),
    ("serve nowhere", "nowhere"),
    ("serve folder", "folder"),
    ("serve run run", "run"),
    ("serve run --temperature 1", "--temperature"),
    ("serve run --seed 1", "--seed"),
    ("convert upcicle", "'upcicle'"),
    ("convert adapters", "RUN"),
    ("convert adapters run --output new", "--base"),
    ("convert adapters nowhere --base folder --output new", "nowhere"),
    ("convert adapters run --base folder --output new", "train.lora"),
    ("convert upcycle", "--output"),
    ("convert upcycle --output new", "no directory of a run"),
    ("convert upcycle run", "--output"),
    ("convert upcycle nowhere --output new", "nowhere"),
    ("convert upcycle folder --output new", "folder"),
    ("convert upcycle text.txt --output new", "text.txt"),
    ("convert upcycle run run --output new", "run"),
    ("convert upcycle run --output new --nowhere 1", "nowhere"),
    ("convert upcycle run --output new --model.hidden_size 64", "--model.hidden_size"),
    ("convert upcycle run --output new --run.directory x", "--run.directory"),
    ("convert upcycle run --output new", "model.bias"),
    ("preprocess", "--input"),
    ("preprocess tokenise", "'tokenise'"),
    ("preprocess --input documents.jsonl --tokenizer bytes", "--output"),
    ("preprocess --input documents.jsonl --output out", "--tokenizer"),
    ("preprocess --tokenizer bytes --output out", "--input"),
    ("preprocess --input --tokenizer bytes --output out", "--input"),
    ("preprocess --inputt documents.jsonl --tokenizer bytes --output out", "--inputt"),
    ("preprocess --input documents.jsonl --tokenizer bytes --output out --seed 1", "--seed"),
    ("preprocess --input documents.jsonl --tokenizer bytes --output out extra", "extra"),
    ("preprocess --input documents.jsonl --tokenizer bytes --output out --json-key text text", "--json-key"),
    ("preprocess --input text.txt --tokenizer bytes --output out --json-key title", "--json-key"),
    ("preprocess merge", "--input"),
    ("preprocess merge --input tokens", "--output"),
    ("preprocess merge --input tokens wide --output out", "wide"),
    ("preprocess merge --input tokens --output out --nowhere", "--nowhere"),
    ("preprocess inspect", "PREFIX"),
    ("preprocess inspect nowhere", "nowhere"),
    ("preprocess inspect folder", "folder"),
    ("preprocess inspect text.txt", "text.txt"),
    ("preprocess inspect tokens tokens", "tokens"),
    ("preprocess inspect tokens --nowhere", "--nowhere"),
    ("preprocess order", "PREFIX"),
    ("preprocess order tokens", "--sequence-length"),
    ("preprocess order nowhere --sequence-length 8 --samples 1 --seed 1 --split 1,0,0", "nowhere"),
    ("curate", "--steps"),
    ("curate --steps exact", "--input"),
    ("curate --steps exact --input documents.jsonl", "--output"),
    ("curate curation.yaml --steps nowhere", "steps"),
    ("curate curation.yaml --input nowhere.jsonl", "nowhere.jsonl"),
    ("curate curation.yaml --input text.txt", "text.txt"),
    ("curate curation.yaml curation.yaml", "curation.yaml"),
    ("curate nowhere.yaml", "nowhere.yaml"),
    ("curate exact.yaml --length.least 5", "length"),
    ("curate curation.yaml --steps exact length --length.least 9 --length.most 5", "length.most"),
    ("curate curation.yaml --steps decontaminate --decontaminate.tasks nowhere.jsonl", "nowhere.jsonl"),
    ("curate exact.yaml --steps decontaminate", "decontaminate.tasks"),
    ("curate curation.yaml --steps decontaminate --decontaminate.ngram 3", "decontaminate.ngram"),
    # settings that do not go together
    ("train tiny.yaml --model.num_heads 3", "model.num_heads"),
    ("train tiny.yaml --model.num_kv_heads 3", "model.num_kv_heads"),
    ("train tiny.yaml --model.max_positions 16", "model.max_positions"),
    ("train tiny.yaml --model.vocab_size 100", "model.vocab_size"),
    ("train tiny.yaml --model.position rotary --model.max_positions 64", "model.max_positions"),
    ("train tiny.yaml --model.rotary.base 5", "model.rotary.base"),
    ("train tiny.yaml --model.rotary.scaling.factor 5", "model.rotary.scaling.factor"),
    ("train tiny.yaml --model.attention.window 8", "model.attention.window"),
    ("train tiny.yaml --model.pattern W-", "model.attention.window"),
    ("train tiny.yaml --model.pattern - --model.num_kv_heads 1", "model.num_kv_heads"),
    ("train tiny.yaml --model.pattern * --model.mlp_size 64", "model.mlp_size"),
    ("train tiny.yaml --model.pattern - --model.recompute attention", "model.recompute"),
    ("train tiny.yaml --model.pattern - --model.recompute all_but_cores", "model.recompute"),
    ("train tiny.yaml --model.recompute attention attention_core", "model.recompute"),
    ("train tiny.yaml --data.workers 9", "data.workers"),
    ("train tiny.yaml --data.train tokens", "data.train"),
    ("train tiny.yaml --data.validation tokens", "data.validation"),
    ("train tiny.yaml --data.skip 5 3", "data.skip"),
    ("train tiny.yaml --data.samples 5", "data.samples"),
    ("train tiny.yaml --data.split 9,1,0", "data.split"),
    ("train tiny.yaml --data.chat.too_long truncate", "data.chat.too_long"),
    ("train tiny.yaml --data.chat.markers a", "data.chat.markers"),
    ("train tiny.yaml --data.format tokens", "text.txt"),
    ("train tiny.yaml --data.format chat", "text.txt"),
    ("train tiny.yaml --data.path tokens --data.validation_fraction 0.2", "data.validation_fraction"),
    ("train tiny.yaml --data.path tokens --data.tokenizer characters", "data.tokenizer"),
    ("train tiny.yaml --data.path 0.5 text.txt", "text.txt"),
    ("train tiny.yaml --data.path -1 tokens 2 wide", "-1"),
    ("train tiny.yaml --data.path nan tokens 2 wide", "nan"),
    ("train tiny.yaml --data.validation_fraction 0.9999", "data.validation_fraction"),
    ("train tiny.yaml --data.sequence_length 99999", "data.sequence_length"),
    ("train tiny.yaml --train.loss_scale.initial 8", "train.loss_scale"),
    ("train tiny.yaml --train.precision fp16 --train.loss_scale.minimum 1e9", "train.loss_scale.minimum"),
    ("train tiny.yaml --train.health.on_bad wait", "train.health.on_bad"),
    ("train tiny.yaml --train.health.gradient_spike 1", "train.health.gradient_spike"),
    ("train tiny.yaml --train.health.loss_spike nan", "train.health.loss_spike"),
    ("train tiny.yaml --train.health.window 50", "train.health.window"),
    ("train tiny.yaml --train.health.loss_spike 3 --train.health.window 0", "train.health.window"),
    ("train tiny.yaml --train.health.patience 3", "train.health.patience"),
    ("train tiny.yaml --train.health.on_bad skip --train.health.patience 0", "train.health.patience"),
    ("train tiny.yaml --train.watchdog.factor 1", "train.watchdog.factor"),
    ("train tiny.yaml --train.watchdog.floor_seconds 0", "train.watchdog.floor_seconds"),
    ("train tiny.yaml --train.watchdog.factor none --train.watchdog.floor_seconds 9", "train.watchdog.floor_seconds"),
    ("train tiny.yaml --checkpoint.every 2 --checkpoint.keep_every 3", "checkpoint.keep_every"),
    ("train tiny.yaml --checkpoint.every 0 --checkpoint.keep_every 3", "checkpoint.keep_every"),
    ("train tiny.yaml --checkpoint.every 0 --checkpoint.keep_best 1", "checkpoint.keep_best"),
    ("train tiny.yaml --checkpoint.every 3 --checkpoint.keep_best 1", "checkpoint.keep_best"),
    ("train tiny.yaml --train.health.replay_every 0", "train.health.replay_every"),
    ("train tiny.yaml --train.health.compare_every 0", "train.health.compare_every"),
    ("train tiny.yaml --checkpoint.local_every 3", "checkpoint.local_every"),
    ("train tiny.yaml --checkpoint.local_directory folder", "checkpoint.local_directory"),
    ("train tiny.yaml --checkpoint.memory_directory folder", "checkpoint.memory_directory"),
    ("train tiny.yaml --model.fp8.scaling delayed", "model.fp8.scaling"),
    ("train tiny.yaml --model.fp8.scaling current --train.precision fp16", "model.fp8.scaling"),
    ("train tiny.yaml --model.fp8.scaling current --model.pattern M", "model.fp8.scaling"),
    ("train tiny.yaml --model.fp8.scaling block --train.precision fp16", "model.fp8.scaling"),
    ("train tiny.yaml --model.fp8.scaling block --model.pattern M", "model.fp8.scaling"),
    ("train tiny.yaml --train.microbatches 3", "train.microbatches"),
    ("train tiny.yaml --train.global_batch 7", "train.global_batch"),
    ("train tiny.yaml --train.lora.alpha 4", "train.lora"),
    ("train tiny.yaml --train.lora.rank 4 --train.trainable !head.*", "train.trainable"),
    ("train tiny.yaml --train.batch_ramp.start 4", "train.batch_ramp"),
    ("train tiny.yaml --train.batch_ramp {start:9,increment:1,samples:9}", "train.batch_ramp"),
    ("train tiny.yaml --optimizer.momentum 0.5", "optimizer.momentum"),
    ("train tiny.yaml --optimizer.name sgd --optimizer.beta1 0.5", "optimizer.beta1"),
    ("train tiny.yaml --optimizer.anneal_steps 5", "optimizer.anneal_steps"),
    ("train tiny.yaml --optimizer.minimum_learning_rate 1", "optimizer.minimum_learning_rate"),
    ("train tiny.yaml --optimizer.warmup_steps 5 --optimizer.decay_steps 5", "optimizer.decay_steps"),
    ("train tiny.yaml --optimizer.weight_decay 0 --optimizer.decay_roles bias", "optimizer.decay_roles"),
    ("train tiny.yaml --mesh.data -1 --mesh.fsdp -1", "mesh"),
    ("train tiny.yaml --mesh.data 0", "mesh.data"),
    ("train tiny.yaml --mesh.tensor -2", "mesh.tensor"),
    ("train tiny.yaml --mesh.tensor 3", "mesh.tensor"),
    ("train tiny.yaml --mesh.tensor 4", "mesh.tensor"),
    ("train tiny.yaml --mesh.data 16", "mesh.data"),
    ("train tiny.yaml --mesh.expert 2", "mesh.expert"),
    ("plan tiny.yaml --layout --mesh.expert_tensor 2", "mesh.expert_tensor"),
    ("train tiny.yaml --mesh.context 3", "mesh.context"),
    ("train tiny.yaml --context.inner 4", "context.inner"),
    ("train tiny.yaml --context.method all_to_all", "context.method"),
    ("train tiny.yaml --pipeline.chunks 2", "pipeline.chunks"),
    ("train tiny.yaml --pipeline.stage_layers 1", "pipeline.stage_layers"),
    ("train tiny.yaml --mesh.pipe 2", "mesh.pipe"),
    ("train tiny.yaml --run.profile_steps 5 3", "run.profile_steps"),
    ("train tiny.yaml --run.profile_steps 2 9", "run.profile_steps"),
    ("train tiny.yaml --run.max_minutes 0", "run.max_minutes"),
    ("train tiny.yaml --run.max_minutes 1h", "run.max_minutes"),
    ("train tiny.yaml --run.trackers wandb wandb", "run.trackers"),
    ("train tiny.yaml --runtime.process_id 0", "runtime.process_id"),
    ("train tiny.yaml --runtime.xla_preset latency", "runtime.xla_preset"),
    # sizes that no machine has
    ("train tiny.yaml --model.vocab_size 2147483647", "model.vocab_size"),
    ("train tiny.yaml --model.hidden_size 4000000000", "model.hidden_size"),
    ("train tiny.yaml --model.num_layers 2147483648", "model.num_layers"),
    ("train tiny.yaml --model.num_layers 4000000000000000000000", "model.num_layers"),
    ("train tiny.yaml --model.mlp_size 4000000000", "model.mlp_size"),
    ("train tiny.yaml --model.head_dim 4000000000", "model.head_dim"),
    ("train tiny.yaml --model.vocab_multiple 4000000000", "model.vocab_multiple"),
    ("train tiny.yaml --model.max_positions 4000000000", "model.max_positions"),
    ("train tiny.yaml --train.global_batch 4000000000", "train.global_batch"),
    ("train tiny.yaml --model.hidden_size 1000000 --model.num_layers 1000", "model.hidden_size"),
    ("plan tiny.yaml --layout --model.hidden_size 4000000000", "model.hidden_size"),
    ("plan tiny.yaml --schedule --model.hidden_size 4000000000", "model.hidden_size"),
    ("plan tiny.yaml --gpu h100 --model.hidden_size 4000000000", "model.hidden_size"),
    ("plan tiny.yaml --search --gpu h100 --model.num_layers 4000000000", "model.num_layers"),
)


def short(word: str) -> str:
    """A word as a part of a test's name."""
    return ascii(word[:20])[1:-1]


def _names(name: str, value: str) -> tuple[str, str]:
    """What an error about a value of a setting or flag must have: the name, or the value."""
    return name, value.partition(":")[0] or name


def text_cases() -> Iterator[Case]:
    """Every text setting with its bad values."""
    for name, (start, values) in TEXTS.items():
        for value in values:
            yield Case(f"{start[0]} {name} {short(value)}", (*start, f"--{name}", value), _names(name, value))


def flag_cases() -> Iterator[Case]:
    """Every flag that is no setting with its bad values, without one, and flags that no command has."""
    for command, (start, flags) in FLAGS.items():
        for flag, values in flags.items():
            extra = KIND_FLAGS.get(flag, ("--gpu", "h100")) if command == "plan" else ()
            # of a list that goes on, the bad value alone
            line = start[: start.index(flag)] if (command, flag) in ALONE else start
            for value in values:
                yield Case(f"{command} {flag} {short(value)}", (*line, *extra, flag, value), _names(flag, value))
            yield Case(f"{command} {flag} missing", (*start, *extra, flag), (flag,))
        for flag in ("--nowhere", "-x", "--größe✓", f"--{LONG}"):
            yield Case(f"{command} {short(flag)}", (*start, flag, "1"), (flag.lstrip("-")[:20],))


def line_cases() -> Iterator[Case]:
    """The whole lines above."""
    for line, mention in LINES:
        yield Case(line, tuple(line.split(" ")), (mention,))
    yield Case("an empty verb", ("",), ("''",))
    yield Case("a long verb", (LONG,), ("xxx",))
