"""Open WebUI: pip install open-webui. A tool of the user's reads the file; a chat is asked as by the page."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from toolbox import FIRST, KEY, SECOND, URL, second_turn

TOOL = '''
class Tools:
    def read_file(self, path: str) -> str:
        """
        Reads a file.
        :param path: The file's path
        """
        with open(path) as file:
            return file.read()
'''
print("open-webui", version("open-webui"), flush=True)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
settings = {
    "DATA_DIR": str(Path(os.environ["HOME"], "data")),
    "WEBUI_AUTH": "False",
    "WEBUI_SECRET_KEY": "scripted",
    "OPENAI_API_BASE_URL": f"{URL}/v1",
    "OPENAI_API_KEY": KEY,
    "ENABLE_OLLAMA_API": "False",
    "OFFLINE_MODE": "True",
    "RAG_EMBEDDING_ENGINE": "openai",
}
command = [
    str(Path(sys.executable).with_name("open-webui")),
    "serve",
    "--host",
    "127.0.0.1",
    "--port",
    str(port),
]
page = subprocess.Popen(command, env=os.environ | settings, stdout=sys.stderr, stderr=sys.stderr)
token = ""


def call(path: str, body: Any = None) -> Any:
    """The answer of Open WebUI."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(f"http://127.0.0.1:{port}{path}", data, headers), timeout=60) as answer:
        return json.load(answer)


def ask(question: str, chat: str | None, parent: str | None) -> tuple[str, str, str]:
    """What is answered in a chat, that chat, and the answer's id there."""
    user, assistant = f"user-{time.time_ns()}", f"assistant-{time.time_ns()}"
    message = {
        "id": user,
        "parentId": parent,
        "childrenIds": [assistant],
        "role": "user",
        "content": question,
    }
    body = {
        "model": "scripted",
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "tool_ids": ["reader"],
        "session_id": "scripted",
        "id": assistant,
        "user_message": message,
        "parent_id": parent,
    }
    begun = call("/api/chat/completions", body | ({"chat_id": chat} if chat else {}))
    chat = chat or str(begun["chat_id"])
    for _ in range(240):
        answer = call(f"/api/v1/chats/{chat}")["chat"]["history"]["messages"].get(assistant, {})
        if answer.get("done"):
            return str(answer["content"] or answer.get("error")), chat, assistant
        time.sleep(0.5)
    sys.exit("no answer within two minutes")


try:
    for _ in range(240):
        try:
            call("/health")
            break
        except OSError:
            time.sleep(0.5)
    token = call("/api/v1/auths/signin", {"email": "", "password": ""})["token"]
    reader = {"id": "reader", "name": "Reader", "content": TOOL, "meta": {"description": "Reads files"}}
    call("/api/v1/tools/create", reader)
    said, chat, last = ask(FIRST, None, None)
    print(said)
    second_turn()
    print(ask(SECOND, chat, last)[0])
finally:
    page.kill()
