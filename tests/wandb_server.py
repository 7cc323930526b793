"""A double of the Weights & Biases server on the loopback: it keeps what clients send, and can fail as servers do.

It answers the operations that wandb 0.31 and wandb-workspaces 0.4 ask for, and nothing else: an unknown one is kept in
``unknown`` and answered with an error, so that a new version that asks for more is noticed.
"""

from __future__ import annotations

import base64
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ENTITY = "tester"
KEY = "0123456789" * 4
_THEN = "2026-01-02T03:04:05Z"
_STREAM = re.compile(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream")


@dataclass
class Run:
    """A run as the server holds it."""

    name: str
    project: str
    fields: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    preempting: bool = False
    exit_codes: list[int] = field(default_factory=list)
    uses: list[str] = field(default_factory=list)  # names of artifacts


class WandbServer:
    """What clients sent, by kind, and how the server behaves.

    Attributes:
        behaviour: ``ok``; ``401``, ``429`` or ``500``, with which every request is answered; or ``hang``: connections
            are taken and nothing is answered.
        refused: operations that are answered with an error, whatever the behaviour.
        artifacts: identifier → what was sent of it, and its state.
    """

    def __init__(self, url: str) -> None:
        self.url, self.behaviour = url, "ok"
        self.refused: set[str] = set()
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.received: list[bytes] = []  # whatever was sent, as it came
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.lock = threading.Lock()
        self.released = threading.Event()

    @property
    def environment(self) -> dict[str, str]:
        """For a client: where the server is, and a key that it takes."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def run_of(self, entity: str | None, project: str, name: str) -> Run:
        assert entity in (None, "", ENTITY), entity
        return self.runs.setdefault(name, Run(name, project))

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Data of one GraphQL operation; KeyError for an unknown one."""
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = named[1] if named else query.split(maxsplit=1)[0]
        self.operations.append(operation)
        known: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "Viewer": self._viewer,
            "GetDefaultEntity": self._viewer,
            "RunResumeStatus": self._resume,
            "Run": self._run,
            "RunHistoryKeys": self._run,
            "UpsertBucket": self._upsert,
            "CreateRunFiles": self._create_files,
            "ServerFeaturesQuery": lambda _: {"serverInfo": {"features": []}},
            "ArtifactType": self._artifact_type,
            "CreateArtifact": self._create_artifact,
            "ArtifactByID": self._artifact_by_id,
            "CreateArtifactManifest": self._create_manifest,
            "UpdateArtifactManifest": self._create_manifest,
            "CommitArtifact": self._commit_artifact,
            "UseArtifact": self._use_artifact,
            "GetProjects": self._projects,
            "ProjectInternalId": lambda asked: {"project": self._project(asked["projectName"])},
            "upsertView": self._upsert_view,
        }
        return known[operation](variables)

    def _viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {"viewer": {"id": "user", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": teams}}

    def _project(self, name: str) -> dict[str, Any]:
        own = {"id": _opaque("Project", name), "internalId": _opaque("ProjectInternal", name), "name": name}
        return own | {"entityName": ENTITY, "entity": {"id": "entity", "name": ENTITY}}

    def _resume(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        project = self._project(variables["project"])
        return {"model": project | {"bucket": None if run is None else self._bucket(run)}}

    def _run(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.run_of(variables["entity"], variables["project"], variables["name"])
        last = run.history[-1]["_step"] if run.history else -1
        return {"project": {"run": self._bucket(run) | {
            "projectId": "1", "state": "running", "historyKeys": {"lastStep": last}, "systemMetrics": "{}",
            "readOnly": False, "user": {"name": ENTITY, "username": ENTITY},
        }}}  # fmt: skip

    def _bucket(self, run: Run) -> dict[str, Any]:
        return {
            "id": _opaque("Run", run.name), "name": run.name, "displayName": run.fields.get("displayName"),
            "description": "", "sweepName": "", "summaryMetrics": json.dumps(run.summary), "logLineCount": 0,
            "historyLineCount": len(run.history), "historyTail": json.dumps([*map(json.dumps, run.history[-1:])]),
            "eventsLineCount": len(run.events), "eventsTail": json.dumps([*map(json.dumps, run.events[-1:])]),
            "config": json.dumps(run.config), "tags": run.fields.get("tags") or [], "wandbConfig": '{"t": 1}',
            "project": self._project(run.project),
        }  # fmt: skip

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        new = variables["name"] not in self.runs
        run = self.run_of(variables.get("entity"), variables["project"], variables["name"])
        run.fields |= {name: value for name, value in variables.items() if value is not None}
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": new}}

    def _create_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[variables["run"]]
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{run.name}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": _opaque("Run", run.name), "uploadHeaders": [], "files": files}}

    def _artifact_type(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"].partition(":")[0]
        kinds = {sent["artifactCollectionName"]: sent["artifactTypeName"] for sent in self.artifacts.values()}
        return {"project": {"artifact": {"artifactType": {"name": kinds[name]}} if name in kinds else None}}

    def _create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        sent = variables["input"]
        identifier = _opaque("Artifact", f"{sent['artifactCollectionName']}/{sent['digest']}")
        state = self.artifacts.setdefault(identifier, sent | {"state": "PENDING"})["state"]
        sequence = {"latestArtifact": {"id": identifier} if state == "COMMITTED" else None}
        return {"createArtifact": {"artifact": {"id": identifier, "state": state, "artifactSequence": sequence}}}

    def _artifact_by_id(self, variables: dict[str, Any]) -> dict[str, Any]:
        sent = self.artifacts[variables["id"]]
        name, digest = sent["artifactCollectionName"], sent["digest"]
        sequence = {"__typename": "ArtifactSequence", "id": _opaque("Collection", name), "name": name}
        sequence["project"] = self._project("paws")
        return {"artifact": {
            "__typename": "Artifact", "id": variables["id"], "artifactSequence": sequence,
            "versionIndex": 0, "artifactType": {"name": sent["artifactTypeName"]}, "description": None,
            "metadata": sent["metadata"], "ttlDurationSeconds": -1, "ttlIsInherited": False, "tags": [],
            "historyStep": None, "state": "COMMITTED", "size": 0, "digest": digest, "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": digest, "fileCount": 1, "createdAt": _THEN, "updatedAt": None, "aliases": [],
        }}  # fmt: skip

    def _create_manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        sent = variables.get("input") or variables
        identifier = _opaque("Manifest", sent.get("artifactID") or sent.get("artifactManifestID"))
        file = {"id": identifier, "name": "wandb_manifest.json", "displayName": "wandb_manifest.json"}
        file |= {"uploadUrl": f"{self.url}/storage/manifests/{identifier}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": identifier, "file": file}}}

    def _commit_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        identifier = (variables.get("input") or variables)["artifactID"]
        self.artifacts[identifier]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": identifier, "digest": self.artifacts[identifier]["digest"]}}}

    def _use_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        sent = variables.get("input") or variables
        artifact = self.artifacts[sent["artifactID"]]
        self.runs[sent["runName"]].uses.append(artifact["artifactCollectionName"])
        return {"useArtifact": {"artifact": {"id": sent["artifactID"], "digest": artifact["digest"]}}}

    def _projects(self, _: dict[str, Any]) -> dict[str, Any]:
        own = {"__typename": "Project", "createdAt": _THEN, "isBenchmark": False, "user": None}
        node, page = self._project("paws") | own, {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": page, "edges": [{"node": node}]}}

    def _upsert_view(self, variables: dict[str, Any]) -> dict[str, Any]:
        identifier = variables["id"] or _opaque("View", str(len(self.reports)))
        inserted = identifier not in self.reports
        sent = {name: variables[name] for name in ("type", "name", "displayName", "description", "spec")}
        own = {"id": identifier, "project": self._project(variables["projectName"])}
        self.reports[identifier] = sent | own | {"createdAt": _THEN, "updatedAt": _THEN}
        return {"upsertView": {"view": self.reports[identifier], "inserted": inserted}}

    def stream(self, project: str, name: str, sent: dict[str, Any]) -> None:
        """Take lines of a run's files."""
        run = self.run_of(None, project, name)
        for file, content in (sent.get("files") or {}).items():
            offset, lines = content.get("offset", 0), content["content"]
            match file:
                case "wandb-history.jsonl":
                    run.history[offset:] = [json.loads(line) for line in lines]
                case "wandb-events.jsonl":
                    run.events[offset:] = [json.loads(line) for line in lines]
                case "wandb-summary.json":
                    run.summary = json.loads(lines[-1])
        if sent.get("preempting"):
            run.preempting = True
        if sent.get("complete"):
            run.exit_codes.append(sent["exitcode"])


def _opaque(kind: str, name: str) -> str:
    return base64.b64encode(f"{kind}:{name}".encode()).decode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_GET  # noqa: N815 - names that http.server asks for

    def _serve(self) -> None:
        double = self.server.double
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        with double.lock:
            double.received += [self.path.encode(), body]
        match double.behaviour:
            case "hang":
                double.released.wait()
                self.close_connection = True
                return
            case "ok":
                pass
            case status:
                self._send(int(status), {"errors": [{"message": f"told to answer {status}"}], "error": "as told"})
                return
        if path == "/graphql":
            asked = json.loads(body)
            if asked.get("operationName") in double.refused:
                self._send(200, {"errors": [{"message": "told to refuse this"}]})
                return
            with double.lock:
                try:
                    data = double.answer(asked["query"], asked.get("variables") or {})
                except KeyError as unknown:
                    double.unknown.append(f"{unknown} in {body.decode()}")
                    self._send(200, {"errors": [{"message": f"the double knows no {unknown}"}]})
                    return
            self._send(200, {"data": data})
        elif streamed := _STREAM.fullmatch(path):
            with double.lock:
                double.stream(streamed[2], streamed[3], json.loads(body))
            self._send(200, {"exitcode": None, "limits": {}})
        elif path.startswith("/sdk/otel/") or self.command == "PUT":
            self._send(200, {})
        else:
            double.unknown.append(f"{self.command} {self.path}")
            self._send(404, {})

    def _send(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle(self) -> None:
        with suppress(ConnectionError):  # of a client that was killed
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    double: WandbServer


def outside(patch: pytest.MonkeyPatch, folder: Path, server: WandbServer) -> None:
    """The environment of a user who is logged in to ``server``, whose home is ``folder``."""
    for name, value in (server.environment | {"HOME": str(folder), "NETRC": str(folder / "netrc")}).items():
        patch.setenv(name, value)
    patch.setenv("WANDB_MODE", "")
    del os.environ["WANDB_MODE"]  # training may set it, and the patch takes it back


@contextmanager
def serving() -> Iterator[WandbServer]:
    """A server while the block runs."""
    http = _Http(("127.0.0.1", 0), _Handler)
    http.double = WandbServer(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield http.double
    finally:
        http.double.released.set()
        http.shutdown()
        thread.join()
        http.server_close()
