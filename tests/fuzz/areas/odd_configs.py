"""Values that config.json, tokenizer_config.json and an index of weights must not hold, or may."""

from typing import Any

from tests.fuzz.mutations import Raw

# Code that would be run on loading, and a pickle that would run a command.
CODE = "import pathlib\npathlib.Path('pwned').touch()\nclass Model: ...\n"
PICKLE = b"cposix\nsystem\n(S'touch pwned'\ntR."
ODD: tuple[Any, ...] = (None, "x", -1, 0, [], {}, True, 10**400, 1e39, float("nan"))
CONFIG_VALUES: tuple[tuple[str, Any], ...] = (
    *(("model_type", value) for value in (None, "", "own_model", "bert", "gemma3", "t5", 5, ["llama"], "a\nerror: b")),
    *(("architectures", value) for value in (None, [], "Llama", [5], ["BertModel"], {})),
    *(("vocab_size", value) for value in (*ODD, 10, 399, 401, 2**40)),
    *(("hidden_size", value) for value in (*ODD, 33, 2**40)),
    *(("num_hidden_layers", value) for value in (None, 0, -1, 1, 3, 10**9, "2")),
    *(("num_attention_heads", value) for value in (None, 0, -1, 3, "2")),
    *(("max_position_embeddings", value) for value in (None, 0, -1, 4, 10**400, "x", 1.5)),
    *(("eos_token_id", value) for value in (*ODD, [1], [1, 2], 10**9)),
    *(("pad_token_id", value) for value in (*ODD, 1, 10**9)),
    *(("tie_word_embeddings", value) for value in (None, False, "x")),
    *(("dtype", value) for value in ("float99", 5, "int8", "float16", None)),
    *(
        ("rope_parameters", value)
        for value in (None, 5, {"rope_type": "none"}, {"rope_type": "dynamic"}, {"factor": 0})
    ),
    *(("attention_dropout", value) for value in (0.5, "x", -1, 2)),
    *(("hidden_act", value) for value in ("none", 5, "__import__('os')")),
    *(("rms_norm_eps", value) for value in (0, -1, "x", 1e300)),
    *(("quantization_config", value) for value in ({}, {"quant_method": "gptq"}, {"quant_method": "none"}, 5)),
    *(("num_labels", value) for value in (0, 5, "x")),
    *(("id2label", value) for value in ([], {"x": 1}, 5)),
    ("deep", Raw("[" * 3000 + "]" * 3000)),
    ("attn_implementation", "flash_attention_2"),
    ("_name_or_path", "../../etc"),
)
TOKENIZER_VALUES: tuple[tuple[str, Any], ...] = (
    *(
        ("tokenizer_class", value)
        for value in (None, 5, "NoSuchTokenizer", "BertTokenizer", "LlamaTokenizer", "os.system")
    ),
    *(("eos_token", value) for value in (None, 5, "", "<|none|>", ["x"], {"content": 5}, {"content": "<|endoftext|>"})),
    *(("pad_token", value) for value in (None, 5, "", "<|endoftext|>", "a")),
    *(("bos_token", value) for value in (5, "", "<|new|>", "\ud800")),
    *(("model_max_length", value) for value in (*ODD, 5)),
    *(
        ("chat_template", value)
        for value in (5, [], {}, "{{ 1/0 }}", [{"name": "default", "template": "x"}], [{"name": 5}])
    ),
    *(
        ("added_tokens_decoder", value)
        for value in (5, [], {"x": {}}, {"5": {"content": 5}}, {"999999999": {"content": "z"}})
    ),
    *(("extra_special_tokens", value) for value in (5, [5], {"x": 5}, ["<|a|>", "<|a|>"])),
    *(("auto_map", value) for value in (5, {"AutoTokenizer": None}, {"AutoTokenizer": [None, "x--y.Z"]})),
    *(("clean_up_tokenization_spaces", value) for value in (True, "x")),
    *(("padding_side", value) for value in ("left", "up", 5)),
)
SHARD = "model-00001-of-00001.safetensors"
WEIGHT = "model.norm.weight"
INDEXES: tuple[tuple[str, str], ...] = (
    ("no JSON", "{"),
    ("a list", "[]"),
    ("empty", ""),
    ("no weight_map", '{"metadata": {}}'),
    ("a weight_map that is a list", '{"metadata": {}, "weight_map": []}'),
    ("an empty weight_map", '{"metadata": {}, "weight_map": {}}'),
    (
        "a weight_map without most weights",
        f'{{"metadata": {{}}, "weight_map": {{"{WEIGHT}": "{SHARD}"}}}}'.replace(SHARD, "x"),
    ),
    ("a file outside", f'{{"metadata": {{}}, "weight_map": {{"{WEIGHT}": "../../../etc/passwd"}}}}'),
    ("an absolute path", f'{{"metadata": {{}}, "weight_map": {{"{WEIGHT}": "/etc/passwd"}}}}'),
    ("a file that is not there", f'{{"metadata": {{}}, "weight_map": {{"{WEIGHT}": "none.safetensors"}}}}'),
    ("a pickle", f'{{"metadata": {{}}, "weight_map": {{"{WEIGHT}": "pytorch_model.bin"}}}}'),
    ("a number as file", f'{{"metadata": {{}}, "weight_map": {{"{WEIGHT}": 5}}}}'),
    ("no metadata", f'{{"weight_map": {{"{WEIGHT}": 5}}}}'),
    ("nested deeply", "[" * 100_000),
)
