"""LiteLLM: pip install litellm"""

from importlib.metadata import version

import litellm
from toolbox import FIRST, KEY, SECOND, TOOL, URL, result_of, second_turn

print("litellm", version("litellm"))
tools = [{"type": "function", "function": TOOL}]
messages = [{"role": "user", "content": FIRST}]
for question in (SECOND, None):
    while True:
        message = (
            litellm.completion(
                "openai/scripted", messages=messages, tools=tools, api_base=f"{URL}/v1", api_key=KEY
            )
            .choices[0]
            .message
        )
        messages.append(message.model_dump())
        if not message.tool_calls:
            break
        messages += [result_of(call) for call in message.tool_calls]
    print(message.content)
    messages.append({"role": "user", "content": question})
    second_turn(question)
