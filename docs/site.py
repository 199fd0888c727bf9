"""Collect the pages of the site for mkdocs: README, guides, results and the public API."""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
API = ROOT / 'src' / 't2t_vit'
FIRST = ['first-model', 'data', 'training', 'few-images', 'predict', 'python']
FIRST += ['models', 'backbone', 'clients', 'export', 'visualize']
PAGES = {
    'README.md': 'Home',
    'CONTRIBUTING.md': 'Contributing',
    'CHANGELOG.md': 'Changelog',
    'SECURITY.md': 'Reporting',
}
PICTURES = ('.png', '.svg', '.jpg', '.gif', '.webp', '.csv', '.json')


def guides() -> list[Path]:
    """Return docs/*.md, in the order of FIRST; the others follow."""
    found = sorted((ROOT / 'docs').glob('*.md'))
    return sorted(found, key=lambda file: FIRST.index(file.stem) if file.stem in FIRST else len(FIRST))


def modules() -> dict[str, list[str]]:
    """Return the public classes and functions of each module, in the order of the files."""
    found = {}
    for file in sorted(API.rglob('*.py')):
        names = [
            node.name
            for node in ast.parse(file.read_text(encoding='utf-8')).body
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith('_')
        ]
        name = '.'.join(['t2t_vit', *file.relative_to(API).with_suffix('').parts])
        if names and '__' not in name:
            found[name] = names
    return found


def api_page(module: str, names: list[str]) -> str:
    """Write a page of the reference: the module's docstring, then each name."""
    text = (ROOT / 'src' / module.replace('.', '/')).with_suffix('.py').read_text(encoding='utf-8')
    about = ast.get_docstring(ast.parse(text)) or ''
    return '\n\n'.join([f'# {module}', about, *(f'::: {module}.{name}' for name in names)]) + '\n'


def names_page() -> str:
    """Write the page of the names in `t2t_vit`, each with a link to its description."""
    tree = ast.parse((API / '__init__.py').read_text(encoding='utf-8'))
    lines = {
        f'- [`t2t_vit.{alias.name}`][t2t_vit.{node.module}.{alias.name}]'
        if alias.name in modules().get(f't2t_vit.{node.module}', ())
        else f'- `t2t_vit.{alias.name}`, in `{node.module}`'
        for node in ast.walk(tree)  # also imports inside functions
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
        if not (alias.asname or alias.name).startswith('_')
    }
    return '\n'.join(['# t2t_vit', '', ast.get_docstring(tree) or '', '', *sorted(lines), ''])


def on_config(config: Any) -> Any:
    """Build the navigation from the files that exist."""
    results = sorted((ROOT / 'results').rglob('*.md'), key=lambda file: (len(file.parts), file))
    config.nav = [
        {'Home': 'README.md'},
        {'Guides': [path(file) for file in guides()]},
        {'Results': [path(file) for file in results]},
        {
            'Reference': ['reference/t2t_vit.md']
            + [{module.partition('.')[2]: f'reference/{module}.md'} for module in modules()]
        },
        *({title: page} for page, title in PAGES.items() if page != 'README.md'),
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's pages and pictures under their own paths, and a reference page for each module."""
    pages = [ROOT / page for page in PAGES] + [
        file
        for folder in ('docs', 'results')
        for file in sorted((ROOT / folder).rglob('*'))
        if file.suffix in ('.md', *PICTURES)
    ]
    pages += linked(pages)
    site = [File.generated(config, path(file), abs_src_path=str(file)) for file in pages]
    site.append(File.generated(config, 'reference/t2t_vit.md', content=names_page()))
    site += [
        File.generated(config, f'reference/{module}.md', content=api_page(module, names))
        for module, names in modules().items()
    ]
    others = [file for file in files if not (file.abs_src_path or '').startswith(str(ROOT / 'docs'))]  # the theme's
    return Files([*others, *site])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to a folder to its README, as repository viewers do."""
    here = (ROOT / page.file.src_uri).parent

    def readme(link: 're.Match[str]') -> str:
        return f']({link[1].rstrip("/")}/README.md)' if (here / link[1] / 'README.md').is_file() else link[0]

    return re.sub(r'\]\((?!\w+:)([^)#\s]+)\)', readme, markdown)


def linked(pages: list[Path]) -> list[Path]:
    """Return the other files of the repository that pages link to, such as scripts and recipes."""
    targets = {
        (page.parent / target).resolve()
        for page in pages
        if page.suffix == '.md'
        for target in re.findall(r'\]\((?!\w+:)([^)#\s]+)', page.read_text(encoding='utf-8'))
    }
    return sorted(file for file in targets if file.is_file() and file not in pages)


def path(file: Path) -> str:
    """Return the path relative to the repository."""
    return file.relative_to(ROOT).as_posix()
