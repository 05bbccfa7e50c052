"""Build the course as a static site: README, lessons, the system's notebooks, assignments, and pages of the API.

    python dev/site.py [OUT]          build into OUT (default _site) and check every link
    python dev/site.py --check OUT    only check

Everything a page needs is in the folder: no fonts, scripts or pictures from elsewhere. It works at the root of a
server, under a sub-path, and from a disk (there without the search, for which browsers want a server). mkdocs-material draws the pages, mkdocstrings the API, latex2mathml the formulas
(browsers draw MathML themselves, so no script for mathematics is shipped).
"""
import base64, html, json, os, posixpath, re, shutil, subprocess, sys, tempfile
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {'.sh': 'bash', '.py': 'python', '.md': 'markdown', '.toml': 'toml', '.ini': 'ini', '.yaml': 'yaml', '.yml': 'yaml', '.txt': 'text', '.json': 'json', '.slurm': 'bash', '.sbatch': 'bash', '': 'text'}
CSS = '''
.md-typeset .output { border-left: .15rem solid var(--md-default-fg-color--lightest); padding-left: .8rem; margin: -.4rem 0 1.2rem; overflow-x: auto; }
.md-typeset .output pre { margin: 0; } .md-typeset .output pre > code { background: transparent; max-height: 24rem; }
.md-typeset .output img { background: #fff; border-radius: .2rem; } .md-typeset math[display=block] { margin: 1em 0; overflow-x: auto; }
'''


# Notebooks as pages

def mathml(tex: str, display: str) -> str:
    """A formula as MathML. One that cannot be converted is an error: a reader would see source."""
    from latex2mathml.converter import convert
    return convert(tex.strip(), display=display).replace('\n', ' ')


def with_formulas(text: str) -> str:
    """Markdown with `$...$` and `$$...$$` outside code as MathML."""
    keep = r'(^```.*?^```|`[^`\n]*`)'
    def convert(part: str) -> str:
        part = re.sub(r'\$\$(.+?)\$\$', lambda m: mathml(m[1], 'block'), part, flags=re.S)
        return re.sub(r'(?<![\\$\w])\$(?=[^\s$])([^$\n]*?[^\s$\\])\$(?![\w$])', lambda m: mathml(m[1], 'inline'), part)
    return ''.join(p if i % 2 else convert(p) for i, p in enumerate(re.split(keep, text, flags=re.S | re.M)))


def open_details(text: str) -> str:
    """Markdown inside <details> is rendered, as it is in Jupyter."""
    return re.sub(r'<details( open)?>', r'<details\1 markdown="1">', text)


def joined(source) -> str: return source if isinstance(source, str) else ''.join(source)


@dataclass
class Page:
    """A page being written: its Markdown, and files that belong beside it."""
    name: str
    text: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def add(self, *parts: str) -> None: self.text += parts

    def image(self, data: bytes, suffix: str, alt: str) -> None:
        """A picture in a file of its own."""
        file = f'{self.name}_{len(self.files)}.{suffix}'
        self.files[file] = data
        self.add(f'![{alt}]({file}){{ loading=lazy }}')


def fence(text: str, language: str, title: str = '') -> str:
    """A block of code, with more backticks than it holds."""
    ticks = '`' * max(3, 1 + max((len(m) for m in re.findall('`+', text)), default=0))
    return f'{ticks}{language}{f" title={json.dumps(title)}" if title else ""}\n{text.rstrip()}\n{ticks}'


def plain(text: str) -> str:
    """Output without terminal colours; of a line written over itself, the last state."""
    text = re.sub(r'\x1b\[[0-9;]*[A-Za-z]', '', text)
    return '\n'.join(line.rstrip('\r').split('\r')[-1] for line in text.split('\n'))


def add_output(page: Page, out: dict) -> None:
    """One output: a picture if it has one, else HTML, Markdown or text. Widgets have pictures for readers without a kernel."""
    if out['output_type'] == 'stream': return page.add(fence(plain(joined(out['text'])), 'text'))
    if out['output_type'] == 'error': return page.add(fence(plain('\n'.join(out['traceback'])), 'text'))
    data = out.get('data', {})
    alt = re.sub(r'[\[\]\n<>]', ' ', joined(data.get('text/plain', 'figure')))[:120].strip()
    if 'image/svg+xml' in data: page.image(joined(data['image/svg+xml']).encode(), 'svg', alt)
    elif 'image/png' in data: page.image(base64.b64decode(joined(data['image/png'])), 'png', alt)
    elif 'text/html' in data: page.add('<div markdown="0">' + re.sub(r'\n\s*\n', '\n', joined(data['text/html'])) + '</div>')
    elif 'text/markdown' in data: page.add(with_formulas(joined(data['text/markdown'])))
    elif 'text/plain' in data: page.add(fence(plain(joined(data['text/plain'])), 'text'))


def add_code(page: Page, cell: dict, module: str) -> None:
    """A code cell: its source without nbdev's directives, the exported ones under their module's name, then what it showed."""
    lines = joined(cell['source']).split('\n')
    directives = {l.lstrip('#| ').split(' ')[0] for l in lines if l.startswith('#|')}
    if directives & {'hide', 'default_exp'}: return
    source = '\n'.join(l for l in lines if not l.startswith('#|')).strip()
    if source: page.add(fence(source, 'python', module if 'export' in directives else ''))
    shown = [o for o in cell.get('outputs', []) if o.get('data', o)]
    if not shown: return
    page.add('<div class="output" markdown="1">')
    for o in shown: add_output(page, o)
    page.add('</div>')


def notebook_page(path: Path, folder: Path) -> None:
    """Write a notebook as a Markdown page with its pictures into `folder`, the notebook itself beside it."""
    nb = json.loads(path.read_text(encoding='utf8'))
    cells, page = nb['cells'], Page(path.stem)
    module = next((m[1].replace('.', '/') for c in cells if (m := re.match(r'#\| default_exp (\S+)', joined(c['source'])))), '')
    for i, cell in enumerate(cells):
        if cell['cell_type'] == 'markdown': page.add(open_details(with_formulas(joined(cell['source']))))
        elif cell['cell_type'] == 'code': add_code(page, cell, f'nanochat/{module}.py')
        if i == 0: page.add(f'<small>[Download the notebook]({path.name}) to run it.</small>')
    folder.mkdir(parents=True, exist_ok=True)
    (folder/f'{path.stem}.md').write_text('\n\n'.join(page.text) + '\n', encoding='utf8')
    for name, data in page.files.items(): (folder/name).write_bytes(data)
    shutil.copy(path, folder/path.name)


# The folder that mkdocs reads

def notebooks() -> list[Path]:
    """Everything to be read, in the order of reading, as paths within the repository."""
    found = [p for top in ('lessons', 'lessons/assignments', 'nbs', 'nbs/tasks', 'nbs/scripts') for p in sorted((ROOT/top).glob('*.ipynb'))]
    return [p.relative_to(ROOT) for p in found if 'checkpoints' not in str(p)]


def modules() -> list[str]:
    """The package's modules, as they are imported."""
    names = [p.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.') for p in sorted((ROOT/'nanochat').rglob('*.py'))]
    return [n for n in names if not n.rsplit('.', 1)[-1].startswith('_')]


def source_page(docs: Path, path: Path) -> str:
    """A page that shows a text file of the repository; returns where it is within `docs`."""
    page = docs/'files'/f'{path.as_posix()}.md'
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f'# {path.name}\n\n`{path.as_posix()}`\n\n' + fence((ROOT/path).read_text(encoding='utf8'), SOURCES[path.suffix]) + '\n', encoding='utf8')
    return page.relative_to(docs).as_posix()


def link_target(docs: Path, page: Path, link: str) -> str | None:
    """Where a relative link of a page leads on the site; None for links that stay as they are."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or not parts.path: return None
    target = Path(os.path.normpath(page.parent/unquote(parts.path)))
    back = lambda to: posixpath.relpath(to, page.parent.as_posix()) + (f'#{parts.fragment}' if parts.fragment else '')
    if target.suffix == '.ipynb' and (docs/target.with_suffix('.md')).exists() and link != page.with_suffix('.ipynb').name: return back(target.with_suffix('.md').as_posix())
    if (docs/target).is_file(): return None
    if (docs/target).is_dir() or (ROOT/target).is_dir():
        index = next((i for i in (target/'README.md', target/'index.md') if (docs/i).exists()), None)
        return back(index.as_posix()) if index else back({'nbs': 'nbs/00_common.md', 'nanochat': 'api/index.md'}.get(target.as_posix(), 'index.md'))
    if (ROOT/target).is_file() and target.suffix in SOURCES: return back(source_page(docs, target))
    return None


def rewrite_links(docs: Path) -> None:
    """Links between files of the repository become links between pages."""
    pages = [p for p in docs.rglob('*.md') if 'files' not in p.relative_to(docs).parts[:1]]
    for path in pages:
        page, text = path.relative_to(docs), path.read_text(encoding='utf8')
        def new(m: re.Match) -> str:
            to = link_target(docs, page if page.name != 'index.md' or page.parts[0] == 'api' else Path('README.md'), m[2])
            return f'{m[1]}{to}{m[3]}' if to else m[0]
        parts = re.split(r'(^(`{3,}).*?^\2)', text, flags=re.S | re.M)  # code, its ticks, and what is between
        parts = [p if i % 3 else re.sub(r'(\]\()([^)\s]+)(\))', new, p) for i, p in enumerate(parts) if i % 3 != 2 or not re.fullmatch('`{3,}', p)]
        path.write_text(''.join(parts), encoding='utf8')


def api_pages(docs: Path) -> None:
    """A page per module, drawn from its docstrings."""
    (docs/'api').mkdir()
    rows = []
    for name in modules():
        first = re.match(r'\s*"""(.*?)"""', (ROOT/(name.replace('.', '/') + '.py')).read_text(encoding='utf8'), re.S)
        (docs/'api'/f'{name}.md').write_text(f'# {name}\n\n::: {name}\n', encoding='utf8')
        rows.append(f'| [{name}]({name}.md) | {first[1].strip().splitlines()[0] if first else ""} |')
    (docs/'api'/'index.md').write_text('# API\n\nEvery module of the package, exported from the notebook of the same name.\n\n| module | |\n|---|---|\n' + '\n'.join(rows) + '\n', encoding='utf8')


def gather(docs: Path) -> None:
    """Fill the folder that mkdocs reads."""
    docs.mkdir(parents=True)
    (docs/'index.md').write_text(open_details((ROOT/'README.md').read_text(encoding='utf8')), encoding='utf8')
    shutil.copytree(ROOT/'dev'/'images', docs/'dev'/'images')
    shutil.copy(ROOT/'dev'/'LOG.md', docs/'dev'/'LOG.md')
    for p in notebooks(): notebook_page(ROOT/p, docs/p.parent)
    for p in sorted((ROOT/'lessons').rglob('*.md')):
        if 'masters' in p.parts: continue
        to = docs/p.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(open_details(with_formulas(p.read_text(encoding='utf8'))), encoding='utf8')
    for folder in {p.parent for p in (ROOT/'lessons').rglob('*.png')}: shutil.copytree(folder, docs/folder.relative_to(ROOT), dirs_exist_ok=True)
    (docs/'style.css').write_text(CSS, encoding='utf8')
    api_pages(docs)
    rewrite_links(docs)


def title_of(path: Path) -> str:
    """The first heading of a page."""
    return next((l[2:].strip() for l in path.read_text(encoding='utf8').splitlines() if l.startswith('# ')), path.stem)


def navigation(docs: Path) -> list:
    """The menu: what to read first comes first."""
    def pages(top: str, first: str | None = None) -> list:
        found = sorted((docs/top).glob('*.md'), key=lambda p: (p.name != first, p.name))
        return [{title_of(p): p.relative_to(docs).as_posix()} for p in found]
    course = [*pages('lessons', 'README.md')]
    if (docs/'lessons'/'assignments').exists(): course.append({'Assignments': pages('lessons/assignments', 'README.md')})
    if (docs/'lessons'/'leaderboard').exists(): course.append({'Leaderboard': pages('lessons/leaderboard', 'README.md')})
    system = [*pages('nbs'), {'Tasks': pages('nbs/tasks')}, {'Scripts': pages('nbs/scripts')}]
    return [{'nanochat': 'index.md'}, {'Course': course}, {'System': system}, {'API': pages('api', 'index.md')}, {'Log': 'dev/LOG.md'}]


def settings(docs: Path, out: Path) -> dict:
    """mkdocs' configuration."""
    palette = [dict(media=f'(prefers-color-scheme: {s})', scheme={'light': 'default', 'dark': 'slate'}[s], primary='indigo', toggle=dict(icon=f'material/weather-{i}', name=f'Switch to {o}'))
               for s, i, o in (('light', 'sunny', 'dark'), ('dark', 'night', 'light'))]
    show = dict(show_source=False, show_root_heading=False, show_root_toc_entry=False, heading_level=2, members_order='source', show_signature_annotations=True,
                separate_signature=True, filters=['!^_'], docstring_style=None, show_submodules=False, merge_init_into_class=True)
    return dict(site_name='nanochat', site_description='Learn how a ChatGPT is made: a course that is also a working system', docs_dir=str(docs), site_dir=str(out), nav=navigation(docs),
                theme=dict(name='material', font=False, palette=palette, icon=dict(logo='material/chat-processing'),
                           features=['navigation.footer', 'navigation.tabs', 'navigation.top', 'navigation.indexes', 'content.code.copy', 'search.highlight', 'toc.follow']),
                extra=dict(generator=False), extra_css=['style.css'], not_in_nav='files/', use_directory_urls=False,
                plugins=['search', {'mkdocstrings': dict(handlers=dict(python=dict(paths=[str(ROOT)], options=show)))}],
                markdown_extensions=['tables', 'attr_list', 'md_in_html', 'admonition', 'pymdownx.details', {'pymdownx.highlight': dict(anchor_linenums=False)}, 'pymdownx.superfences', 'pymdownx.inlinehilite',
                                     {'toc': dict(permalink=True)}],
                validation=dict(links=dict(anchors='warn', unrecognized_links='warn')))


# Links

class Links(HTMLParser):
    """What a built page points to, and what can be pointed to in it."""
    def __init__(self):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if i := a.get('id') or (tag == 'a' and a.get('name')): self.ids.add(i)
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag in ('script', 'img', 'source', 'iframe', 'video') and a.get('src'): self.loads.append(a['src'])
        if tag == 'link' and a.get('href') and set((a.get('rel') or '').split()) & {'stylesheet', 'icon', 'preload', 'preconnect', 'modulepreload'}: self.loads.append(a['href'])


def broken_links(site: Path) -> list[str]:
    """Sentences about links that lead nowhere, and about anything that would be fetched from outside."""
    pages = {}
    for p in site.rglob('*.html'):
        pages[p] = Links()
        pages[p].feed(re.sub(r'<span(?![^>]* id=)[^>]*>|</span>', '', p.read_text(encoding='utf8')))  # colours of code: nine tags of ten, and no link
    said = []
    for p, found in pages.items():
        here = p.relative_to(site).as_posix()
        said += [f'{here} fetches {u} from outside' for u in found.loads if urlsplit(u).netloc]
        for u in {*found.links, *found.loads}:
            parts = urlsplit(u)
            if parts.scheme or parts.netloc or here == '404.html': continue
            if parts.path.startswith('/'): said.append(f'{here} links to {u}, which does not work under a sub-path')
            to = p if not parts.path else Path(os.path.normpath(p.parent/unquote(parts.path)))
            if to.is_dir(): to = to/'index.html'
            if not to.is_file(): said.append(f'{here} links to {u}, which is not there')
            elif parts.fragment and to in pages and unquote(parts.fragment) not in pages[to].ids and parts.fragment != '__top': said.append(f'{here} links to {u}, a place that the page does not have')
    return sorted(set(said))


def build(out: Path) -> None:
    """Build the site into `out`, replacing what an earlier build left there."""
    if out.exists() and any(out.iterdir()) and not (out/'index.html').exists(): sys.exit(f'{out} is not empty and holds no site; name another folder')
    with tempfile.TemporaryDirectory() as scratch:
        docs, new = Path(scratch)/'docs', Path(scratch)/'site'
        gather(docs)
        (Path(scratch)/'mkdocs.yml').write_text(json.dumps(settings(docs, new)), encoding='utf8')
        env = dict(os.environ, NO_MKDOCS_2_WARNING='1', DISABLE_MKDOCS_2_WARNING='true')
        if code := subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--quiet', '-f', str(Path(scratch)/'mkdocs.yml')], env=env).returncode: sys.exit(code)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(new, out)


def main() -> None:
    args = [a for a in sys.argv[1:] if a != '--check']
    out = Path(args[0] if args else '_site').absolute()
    if '--check' not in sys.argv: build(out)
    if problems := broken_links(out): sys.exit('\n'.join(problems))
    pages = sum(1 for _ in out.rglob('*.html'))
    print(f'{pages} pages, no broken link, nothing fetched from outside: {out}/index.html')


if __name__ == '__main__': main()
