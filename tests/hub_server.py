"""A hub on the loopback: enough of the Hugging Face hub's HTTP for `huggingface_hub` to list and download datasets, with faults on demand.

    with Hub() as hub:
        hub.add('owner/name', {'shard_00000.parquet': path_or_bytes})      # revision main
        hub.faults['shard_00000.parquet'] = [('reset', 5000)]               # each fault is used up by one request for the bytes
        ... HF_ENDPOINT=hub.url ...

As a process of its own: `python tests/hub_server.py ROOT` prints its address; ROOT/<owner>/<name>/ holds the files of each dataset.
Written from the hub's documented behaviour: /api/datasets/R/revision/V, /api/datasets/R/tree/V/FOLDER (paginated by a Link header),
/datasets/R/resolve/V/FILE (a redirect to a content store for large files, with X-Repo-Commit, X-Linked-Etag and X-Linked-Size), byte ranges.
"""
import hashlib, json, os, socket, struct, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

CONVERTED = 'refs/convert/parquet'  # where the hub keeps its own parquet copy of every dataset
PAGE = 50


class Hub(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64

    def __init__(self, port=0):
        super().__init__(('127.0.0.1', port), Handler)
        self.url = f'http://127.0.0.1:{self.server_address[1]}'
        self.repos, self.hashes, self.faults, self.requests, self.lock = {}, {}, {}, [], threading.Lock()
        self.sent = 0  # bytes of files

    def add(self, repo, files, revision='main'):
        """Serve `files` (path in the repository -> path on this disk, or bytes); returns the commit."""
        listing = {path: (source, *self.digests(source)) for path, source in sorted(files.items())}
        commit = hashlib.sha1(json.dumps([repo, revision, [(p, s[1]) for p, s in listing.items()]]).encode()).hexdigest()
        self.repos.setdefault(repo, {}).update({revision: (commit, listing), commit: (commit, listing)})
        return commit

    def add_folder(self, root):
        """Every dataset below root/<owner>/<name>: files in subfolders are the hub's parquet copy, others lie in its main branch."""
        for folder in sorted(p for p in Path(root).glob('*/*') if p.is_dir()):
            files = {p.relative_to(folder).as_posix(): p for p in folder.rglob('*.parquet')}
            top = {k: v for k, v in files.items() if '/' not in k}
            self.add(folder.relative_to(root).as_posix(), top or {'README.md': b'# a dataset\n'})
            if len(top) < len(files): self.add(folder.relative_to(root).as_posix(), {k: v for k, v in files.items() if '/' in k}, CONVERTED)

    def digests(self, source):
        """(sha256, size), remembered by file."""
        if isinstance(source, bytes): return hashlib.sha256(source).hexdigest(), len(source)
        if source not in self.hashes: self.hashes[source] = (hashlib.sha256(Path(source).read_bytes()).hexdigest(), Path(source).stat().st_size)
        return self.hashes[source]

    def fault(self, path):
        """The next fault for a file, if any; ('*' applies to every request of whatever kind)."""
        with self.lock:
            waiting = self.faults.get(path)
            if not waiting: return None
            return waiting.pop(0) if isinstance(waiting, list) else waiting  # a tuple stays for good

    def asked(self, path):
        """The Range headers of the requests for a file's bytes, in order; '' where the whole was asked for."""
        return [r for kind, p, r in self.requests if kind == 'bytes' and p == path]

    def handle_error(self, request, address): pass  # clients that hang up are part of the tests

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.shutdown(); self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub = property(lambda self: self.server)

    def log_message(self, *args): pass

    def reply(self, status, body=b'', **headers):
        if isinstance(body, (dict, list)): body, headers = json.dumps(body).encode(), {'Content-Type': 'application/json', **headers}
        self.send_response(status)
        for k, v in headers.items(): self.send_header(k.replace('_', '-'), str(v))
        if 'Content_Length' not in headers: self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        parts = url.path.strip('/').split('/')
        if (bad := self.hub.fault('*')): return self.reply(bad[1], b'trouble')
        if parts[:2] == ['api', 'datasets'] and len(parts) > 4 and parts[4] in ('revision', 'tree'):
            return self.api('/'.join(parts[2:4]), parts[4], unquote(parts[5]), unquote('/'.join(parts[6:])), parse_qs(url.query))
        if parts[0] == 'datasets' and len(parts) > 5 and parts[3] == 'resolve':
            return self.resolve('/'.join(parts[1:3]), unquote(parts[4]), unquote('/'.join(parts[5:])))
        if parts[0] == 'store': return self.content('/'.join(parts[1:3]), parts[3], unquote('/'.join(parts[4:])))
        self.reply(404, {'error': 'no such page'})

    def find(self, repo, revision):
        if repo not in self.hub.repos: return self.reply(404, {'error': 'Repository not found'}, X_Error_Code='RepoNotFound')
        if revision not in self.hub.repos[repo]: return self.reply(404, {'error': f'Invalid rev id: {revision}'}, X_Error_Code='RevisionNotFound')
        return self.hub.repos[repo][revision]

    def api(self, repo, what, revision, folder, query):
        self.hub.requests.append((what, repo, folder))
        if not (found := self.find(repo, revision)): return
        commit, listing = found
        if what == 'revision':
            return self.reply(200, {'id': repo, '_id': '0' * 24, 'sha': commit, 'private': False, 'gated': False, 'disabled': False, 'downloads': 0, 'likes': 0, 'tags': [], 'siblings': []})
        inside = [p for p in listing if not folder or p.startswith(folder + '/')]
        if folder and not inside: return self.reply(404, {'error': 'Entry not found'}, X_Error_Code='EntryNotFound')
        start = int(query.get('cursor', ['0'])[0])
        entries = [self.entry(p, *listing[p][1:]) for p in inside[start:start + PAGE]]
        link = {}
        if start + PAGE < len(inside):
            link = {'Link': f'<{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={start + PAGE}>; rel="next"'}
        self.reply(200, entries, **link)

    @staticmethod
    def entry(path, sha, size):
        git = hashlib.sha1(path.encode()).hexdigest()
        return {'type': 'file', 'path': path, 'size': size, 'oid': git, 'lfs': {'oid': sha, 'size': size, 'pointerSize': 134}}

    def resolve(self, repo, revision, path):
        if not (found := self.find(repo, revision)): return
        commit, listing = found
        if path not in listing: return self.reply(404, b'Entry not found', X_Error_Code='EntryNotFound', X_Repo_Commit=commit)
        _, sha, size = listing[path]
        self.reply(302, b'', Location=f'{self.hub.url}/store/{repo}/{commit}/{quote(path)}', X_Repo_Commit=commit, X_Linked_Etag=f'"{sha}"', X_Linked_Size=size, ETag=f'"{sha}"')

    def content(self, repo, commit, path):
        """The bytes themselves, by way of the next fault."""
        source, sha, size = self.hub.repos[repo][commit][1][path]
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        asked, (kind, *how) = self.headers.get('Range', ''), self.hub.fault(path) or ('none',)
        self.hub.requests.append(('bytes', path, asked))
        if kind == 'status': return self.reply(how[0], b'trouble', **({'Retry_After': how[1]} if len(how) > 1 else {}))
        if kind == 'corrupt': data = data[:how[0]] + bytes([data[how[0]] ^ 255]) + data[how[0] + 1:]
        start = int(asked.removeprefix('bytes=').split('-')[0]) if asked and kind != 'ignore_range' else 0
        if start >= len(data): return self.reply(416, b'', Content_Range=f'bytes */{len(data)}')
        body = data[start:how[0] if kind == 'short' else None]
        self.send_response(206 if asked and kind != 'ignore_range' else 200)
        for k, v in {'ETag': f'"{sha}"', 'Accept-Ranges': 'bytes', 'Content-Length': len(body) + (how[0] if kind == 'long' else 0), **({'Content-Range': f'bytes {start}-{len(data) - 1}/{len(data)}'} if start else {})}.items():
            self.send_header(k, str(v))
        self.end_headers()
        if self.command != 'HEAD': self.send_body(body, kind, how)

    def send_body(self, body, kind, how):
        if kind == 'long': body += b'x' * how[0]
        step = max(how[0] // 20, 1) if kind == 'slow' else 1 << 16
        limit = how[0] if kind in ('truncate', 'reset', 'stall') else len(body)
        for at in range(0, min(limit, len(body)), step):
            piece = body[at:min(at + step, limit)]
            self.wfile.write(piece)
            self.hub.sent += len(piece)
            if kind == 'slow': time.sleep(.05)
        if kind == 'stall': time.sleep(how[1])
        if kind == 'reset':  # an RST instead of a farewell
            self.wfile.flush()
            time.sleep(.2)  # let the client read what was sent: an RST throws away what it has not
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            os.close(self.connection.detach())
        if kind in ('reset', 'truncate', 'stall', 'short', 'long'): self.close_connection = True


if __name__ == '__main__':
    with Hub(int(sys.argv[2]) if len(sys.argv) > 2 else 0) as hub:
        hub.add_folder(sys.argv[1])
        print(hub.url, flush=True)
        threading.Event().wait()
