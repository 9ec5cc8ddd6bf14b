"""anthropic for Python: pip install anthropic"""

from importlib.metadata import version

import anthropic
from toolbox import FIRST, KEY, SCHEMA, SECOND, URL, read_file, second_turn

print("anthropic", version("anthropic"))
client = anthropic.Anthropic(base_url=URL, api_key=KEY)
tools = [{"name": "read_file", "description": "Reads a file", "input_schema": SCHEMA}]
messages = [{"role": "user", "content": FIRST}]
for question in (SECOND, None):
    while True:
        with client.messages.stream(
            model="claude-sonnet-5", max_tokens=2000, messages=messages, tools=tools
        ) as stream:
            message = stream.get_final_message()
        messages.append({"role": "assistant", "content": message.content})
        if message.stop_reason != "tool_use":
            break
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": read_file(block.input["path"])}
            for block in message.content
            if block.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})
    print("".join(block.text for block in message.content if block.type == "text"))
    messages.append({"role": "user", "content": question})
    second_turn(question)
