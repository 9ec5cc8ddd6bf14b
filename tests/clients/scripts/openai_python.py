"""openai for Python: pip install openai"""

from importlib.metadata import version

import openai
from toolbox import FIRST, KEY, SECOND, TOOL, URL, read, result_of, second_turn

print("openai", version("openai"))
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)
tools = [{"type": "function", "function": TOOL}]
messages = [{"role": "user", "content": FIRST}]
for question in (SECOND, None):
    message = client.chat.completions.create(model="gpt-5", messages=messages, tools=tools).choices[0].message
    while message.tool_calls:
        messages.append(message)
        messages += [result_of(call) for call in message.tool_calls]
        message = (
            client.chat.completions.create(model="gpt-5", messages=messages, tools=tools).choices[0].message
        )
    print(message.content)
    messages += [message, {"role": "user", "content": question}]
    second_turn(question)

# The same with responses that the server keeps.
flat = [{"type": "function", **TOOL, "strict": False}]
response = client.responses.create(model="gpt-5", input=FIRST, tools=[{"type": "web_search"}, *flat])
(call,) = [item for item in response.output if item.type == "function_call"]
result = {"type": "function_call_output", "call_id": call.call_id, "output": read(call.arguments)}
response = client.responses.create(
    model="gpt-5", input=[result], tools=flat, previous_response_id=response.id
)
response = client.responses.create(model="gpt-5", input=SECOND, tools=flat, previous_response_id=response.id)
assert "word-" in response.output_text
