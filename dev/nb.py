"""Edit notebooks as text, run them, and export one of them.

    python dev/nb.py text nbs/05_optim.ipynb              print the cells as text
    python dev/nb.py write nbs/05_optim.ipynb cells.txt   build or update the notebook from text
    python dev/nb.py run nbs/05_optim.ipynb ...           execute, store the outputs, clean
    python dev/nb.py run --base DIR lessons/00_start_here.ipynb    the same with a base directory that stays (and may hold a model)
    python dev/nb.py export nbs/05_optim.ipynb ...        export it to its module

In the text form a cell starts at a line `%% md` or `%% py`. `write` keeps the id and the outputs of
every cell whose source did not change, and the id of one that was edited in place, so that the markers
in the exported module, and with them the diff, stay small.
"""
import difflib, hashlib, os, re, sys, tempfile
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
METADATA = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}


def to_text(path: Path) -> str:
    """The notebook as text, one `%% md` or `%% py` line before each cell."""
    kind = {'markdown': 'md', 'code': 'py'}
    cells = nbformat.read(path, as_version=4).cells
    return '\n'.join(f'%% {kind[c.cell_type]}\n{c.source}\n' for c in cells)


def parse(text: str) -> list[tuple[str, str]]:
    """Text to a list of (cell type, source)."""
    parts = re.split(r'^%% (md|py)[ \t]*\n', text, flags=re.M)[1:]
    pairs = zip(parts[::2], parts[1::2])
    return [({'md': 'markdown', 'py': 'code'}[kind], src.strip('\n')) for kind, src in pairs]


def carry_ids(old: list, new: list, name: str) -> None:
    """Give the new cells the ids, and where unchanged the outputs, of the old ones they stand for."""
    key = lambda c: (c.cell_type, c.source)
    matcher = difflib.SequenceMatcher(None, [key(c) for c in old], [key(c) for c in new], autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == 'insert': continue
        for a, b in zip(old[i1:i2], new[j1:j2]):
            if a.cell_type != b.cell_type: continue
            b.id = a.id
            if tag == 'equal': b.update({k: a[k] for k in ('outputs', 'metadata') if k in a})
    taken = {c.id for c in new if c.id}
    for n, c in enumerate(new):
        while not c.id:
            digest = hashlib.sha1(f'{name}/{n}/{c.source}/{len(taken)}'.encode()).hexdigest()[:8]
            if digest not in taken: c.id = digest
            taken.add(digest)


def write(path: Path, text: str) -> None:
    """Build or update the notebook at `path` from its text form."""
    make = {'markdown': new_markdown_cell, 'code': new_code_cell}
    cells = [make[kind](src) for kind, src in parse(text)]
    for c in cells: c.id = ''
    old = nbformat.read(path, as_version=4).cells if path.exists() else []
    carry_ids(old, cells, path.stem)
    nb = new_notebook(cells=cells, metadata=METADATA)
    nb.nbformat_minor = 5
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    clean(path)


def clean(path: Path) -> None:
    """nbdev's own cleaning: no execution counts, no stray metadata; outputs stay."""
    from nbdev.clean import nbdev_clean
    nbdev_clean(str(path))


WIDGET = 'application/vnd.jupyter.widget-view+json'


def freeze_widgets(nb) -> None:
    """Leave of every widget its picture. A reader without a kernel would see "model not found" in its place, on
    GitHub nothing, and the state of all widgets is many times larger than their pictures. Running brings them back."""
    for c in nb.cells:
        for o in c.get('outputs', []):
            if {'image/png', 'text/html'} & set(o.get('data', {})): o.data.pop(WIDGET, None)
        if c.get('outputs'): c.outputs = [o for o in c.outputs if set(o.get('data', {'': 0})) - {WIDGET, 'text/plain'} or WIDGET not in o.get('data', {})]
    nb.metadata.pop('widgets', None)


def run(path: Path, timeout: int = 300, base: str = '') -> None:
    """Execute a notebook from its own folder with a throwaway base directory, or with `base`, and store its outputs."""
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as throwaway:
        os.environ['NANOCHAT_BASE_DIR'] = base or throwaway
        os.environ.pop('MPLBACKEND', None)  # Agg would leave out every figure that a cell shows
        NotebookClient(nb, timeout=timeout, kernel_name='python3',
                       resources={'metadata': {'path': str(path.parent)}}).execute()
    nb.metadata.pop('language_info', None)
    freeze_widgets(nb)
    nbformat.write(nb, path)
    clean(path)


def export(path: Path) -> None:
    """Export one notebook to its module with nbdev."""
    from nbdev.export import nb_export
    nb_export(path, lib_path=ROOT/'nanochat')


def main(argv: list[str]) -> None:
    """Dispatch the four commands named in the module's docstring."""
    if len(argv) < 2 or argv[0] not in ('text', 'write', 'run', 'export'): sys.exit(__doc__)
    base = ''
    if argv[1] == '--base': base, argv = os.path.abspath(argv[2]), [argv[0], *argv[3:]]
    command, paths = argv[0], [Path(a).resolve() for a in argv[1:]]
    os.chdir(ROOT)
    if command == 'text': print(to_text(paths[0]), end='')
    elif command == 'write': write(paths[0], paths[1].read_text(encoding='utf8'))
    else:
        for p in paths:
            print(p.name, flush=True)
            run(p, base=base) if command == 'run' else export(p)


if __name__ == '__main__': main(sys.argv[1:])
