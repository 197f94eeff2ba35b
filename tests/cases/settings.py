"""Values that no setting can have, and files that hold no settings."""

BIG = 10**9
MEANT: dict[str, list[object]] = {
    "model": [
        'package:--help==1', 'package:-r /etc/passwd==1', 'package:/tmp/evil==1', 'package:./evil==1',
        'package:evil@file:///tmp/evil==1', 'package:git+https://x.org/a==1', 'package:evil[extra]==1',
        "package:evil==1; os_name == 'x'", 'package:evil==1.zip', 'package:evil==1,<2', 'package:evil==*',
        'package:evil==1 --pre', 'package:evil==1\n--pre', 'package:evil>=1', 'package:evil', 'package:evil===1',
        'package:-evil==1', 'package:evil-==1', 'package:evil==1#sha256=12', "package:evil==1#md5=" + "0" * 32,
        'package:évil==1', '../some/where', 'org/..', 'org/-x', '-r/x', 'org/name@../../x', '', 3, ['a'], None,
    ],
    "dtype": ['int8', 32, 'float32\u200b'],
    "calibration.windows": [BIG, -1, 1.5, '32', True],
    "sparsity": ['0.5', 1, -0.1, float("nan"), float("inf")],
    "runtime": ['cpu', None],
    "tasks": [['piqa']],
    "recipe": ['wanda\xa0', 'wanda ', 'wandas', None],
    "calibration.length": [BIG, 1],
    "calibration.seed": [-1],
    "calibration.text": [['embedded'], []],
    "calibration.text.source": ['a.txt', '/a.csv', 'org/..'],
    "calibration.text.split": ['', '../x'],
    "calibration.text.join": [3],
    "method": ['wanda; rm -rf'],
    "pattern": ['2:2', '0:4', '2:4:8', '-1:4', 124, "1:" + "9" * 400],
    "perplexity.length": [BIG, 1],
    "perplexity.windows": [0, 'some'],
    "tasks.names": [
        'piqa', {'piqa': 1}, None, [3], ['../piqa'], ['-h'], ['a b'], ['a;reboot'], ['$(reboot)'], ['a\n'], [''],
    ],
    "tasks.limit": [0],
    "recovery.rate": [0, 2],
    "recovery.batch": [0, 2000],
    "runtime.device": ['cuda:x'],
    "runtime.ray": [4, 'here'],
    "runtime.mirror": ['here'],
    "runtime.speed": [1],
}  # fmt: skip

# Files that are no settings at all.
FILES = {
    "empty": (b"", "found null, expected settings"),
    "a list": (b"[1]", "found [1], expected settings"),
    "half": (b"model: {", "not valid YAML"),
    "binary": (b"\x80\xff", "is no UTF-8"),
    "a nul": (b"a: \0", "not valid YAML"),
    "deep": (b"[" * 400, "not valid YAML"),
    "a Python object": (b"a: !!python/object/apply:os.system [reboot]", "not valid YAML"),
    "a key twice": (b"model: a\nmodel: b", 'not valid YAML: line 2: found duplicate key "model"'),
    "a text twice": (b"perplexity: {texts: {a: {source: ptb}, a: {source: c4}}}", 'line 1: found duplicate key "a"'),
    "an endless alias": (b"a: &a [*a]", "a: no such setting"),
    "two documents": (b"a: 1\n---\nb: 2", "not valid YAML"),
    "a merge's marker": (b"model: a\n<<<<<<< HEAD\n", "params.yaml: not valid YAML: line 3"),
}
