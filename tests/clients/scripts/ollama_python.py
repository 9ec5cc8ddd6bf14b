"""ollama for Python: pip install ollama"""

from importlib.metadata import version

import ollama
from toolbox import FIRST, KEY, SECOND, TOOL, URL, read_file, second_turn

print("ollama", version("ollama"))
client = ollama.Client(URL, headers={"Authorization": f"Bearer {KEY}"})
model = client.list().models[0].model
messages = [{"role": "user", "content": FIRST}]
for question in (SECOND, None):
    while True:
        message = client.chat(model, messages, tools=[{"type": "function", "function": TOOL}]).message
        messages.append(message)
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            text = read_file(call.function.arguments["path"])
            messages.append({"role": "tool", "tool_name": call.function.name, "content": text})
    print(message.content)
    messages.append({"role": "user", "content": question})
    second_turn(question)
