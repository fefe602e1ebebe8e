"""A Hugging Face hub on localhost: repositories, commits, tags, and LFS uploads, in memory.

It answers what huggingface_hub asks for while it creates, uploads, tags and downloads. It
knows two tokens: one that may write, and one that may only read.
"""

import base64
import hashlib
import http.server
import json
import threading

import huggingface_hub

GOOD, READ_ONLY = "hf_goodtokengoodtoken", "hf_readonlyreadonly"


class Hub:
    """The state of the hub. Set `broken_puts` to break the connection of that many LFS uploads."""

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}  # repository: history
        self.tags: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.gated: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.broken_puts = 0
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self):
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()

    def be_the_only_one(self, monkeypatch, folder):
        """Makes huggingface_hub use this hub, with a cache and a token in `folder`."""
        constants = huggingface_hub.constants
        template = self.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.address)
        for module in (constants, huggingface_hub.file_download):  # the latter up to version 0.x
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setenv("HF_TOKEN", GOOD)

    def create(self, repository, files=None, private=False):
        self.commits[repository] = [("0" * 40, {".gitattributes": b"", **(files or {})})]
        self.tags[repository], self.private[repository] = {}, private

    def publish(self, repository, folder):
        self.create(repository, {path.name: path.read_bytes() for path in folder.iterdir()})

    def files(self, repository, revision="main"):
        """The commit of a branch, tag or commit and its files, or None."""
        oid = self.tags[repository].get(revision, revision)
        history = self.commits[repository]
        return history[-1] if oid == "main" else next((c for c in history if c[0] == oid), None)


def _handler(hub):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, content, status=200, **headers):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refused(self, status, code=""):
            self.reply({"error": f"refused {status}"}, status, X_Error_Code=code)

        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.split("?")[0]
            hub.asked.append(f"{self.command} {path}")
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            words = path.strip("/").split("/")
            if words[0] == "put":
                return self.put(words[1], body)
            if "resolve" in words:
                return self.resolve("/".join(words[:2]), words[3], "/".join(words[4:]))
            if path.endswith("/info/lfs/objects/batch"):
                return self.lfs_batch(json.loads(body))
            if path == "/api/validate-yaml":
                return self.reply({"errors": [], "warnings": []})
            if token not in (GOOD, READ_ONLY):
                return self.refused(401)
            if path == "/api/whoami-v2":
                return self.reply({"name": "me", "type": "user", "auth": {}})
            if self.command == "POST" and token == READ_ONLY:
                return self.refused(403)
            if path == "/api/repos/create":
                return self.create(json.loads(body))
            repository, rest = "/".join(words[2:4]), words[4:]
            if repository not in hub.commits:
                return self.refused(404, "RepoNotFound")
            if not rest or rest[0] == "revision":
                return self.info(repository, "/".join(rest[1:]) or "main")
            if rest[0] == "refs":
                tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": oid}
                        for t, oid in hub.tags[repository].items()]  # fmt: skip
                return self.reply({"branches": [], "converts": [], "tags": tags})
            if rest[0] == "tree":
                _, files = hub.files(repository, rest[1])
                return self.reply([
                    {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
                    for name, content in files.items()
                ])  # fmt: skip
            if rest[0] == "preupload":
                return self.preupload(repository, json.loads(body))
            if rest[0] == "commit":
                return self.commit(repository, body)
            if rest[0] == "tag":
                tag = json.loads(body)["tag"]
                if tag in hub.tags[repository]:
                    return self.refused(409)
                oid = "/".join(rest[1:])
                hub.tags[repository][tag] = hub.files(repository, oid)[0]
                return self.reply({})
            return self.refused(404)

        do_GET = do_POST = do_PUT = do_HEAD = answer

        def create(self, asked):
            owner = asked.get("organization") or "me"
            repository = f"{owner}/{asked['name']}"
            if owner != "me":
                return self.refused(403)
            if repository in hub.commits:
                return self.refused(409)
            hub.create(repository, private=bool(asked.get("private")) or
                       asked.get("visibility") == "private")  # fmt: skip
            return self.reply({"url": f"{hub.address}/{repository}", "name": repository})

        def info(self, repository, revision):
            found = hub.files(repository, revision)
            if found is None:
                return self.refused(404, "RevisionNotFound")
            oid, files = found
            card = huggingface_hub.ModelCard(files.get("README.md", b"").decode()).data.to_dict()
            self.reply({"id": repository, "sha": oid, "private": hub.private[repository],
                        "siblings": [{"rfilename": name} for name in files],
                        "cardData": card})  # fmt: skip

        def preupload(self, repository, asked):
            _, there = hub.files(repository)
            found = []
            for file in asked["files"]:
                lfs = file["path"].endswith((".safetensors", ".onnx"))
                content = there.get(file["path"])
                oid = None
                if content is not None:
                    oid = hashlib.sha256(content).hexdigest() if lfs else git_oid(content)
                found.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular",
                              "shouldIgnore": False, "oid": oid})  # fmt: skip
            self.reply({"files": found})

        def lfs_batch(self, asked):
            objects = []
            for item in asked["objects"]:
                entry = {"oid": item["oid"], "size": item["size"]}
                if item["oid"] not in hub.blobs:  # what was sent before is not asked for again
                    entry["actions"] = {"upload": {"href": f"{hub.address}/put/{item['oid']}"}}
                objects.append(entry)
            self.reply({"transfer": "basic", "objects": objects})

        def put(self, oid, body):
            if hub.broken_puts and hub.blobs:
                hub.broken_puts -= 1
                return self.refused(400)
            assert hashlib.sha256(body).hexdigest() == oid
            hub.blobs[oid] = body
            return self.reply(b"")

        def commit(self, repository, body):
            files = dict(hub.files(repository)[1])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            oid = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            hub.commits[repository].append((oid, files))
            url = f"{hub.address}/{repository}/commit/{oid}"
            self.reply({"commitUrl": url, "commitOid": oid, "hookOutput": ""})

        def resolve(self, repository, revision, name):
            if repository in hub.gated:
                return self.refused(403, "GatedRepo")
            if repository not in hub.commits:
                return self.refused(404, "RepoNotFound")
            found = hub.files(repository, revision)
            if found is None:
                return self.refused(404, "RevisionNotFound")
            oid, files = found
            if name not in files:
                return self.reply(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
            return self.reply(files[name], ETag=etag, X_Repo_Commit=oid)

    return Handler


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
