"""LangChain: pip install langchain-openai"""

from importlib.metadata import version

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from toolbox import FIRST, KEY, SECOND, TOOL, URL, read_file, second_turn

print("langchain-openai", version("langchain-openai"))
model = ChatOpenAI(model="scripted", base_url=f"{URL}/v1", api_key=KEY).bind_tools(
    [{"type": "function", "function": TOOL}]
)
messages = [HumanMessage(FIRST)]
for question in (SECOND, None):
    answer = model.invoke(messages)
    while answer.tool_calls:
        results = [
            ToolMessage(read_file(call["args"]["path"]), tool_call_id=call["id"])
            for call in answer.tool_calls
        ]
        messages += [answer, *results]
        answer = model.invoke(messages)
    print(answer.content)
    messages += [answer, HumanMessage(question or "")]
    second_turn(question)
