"""Pydantic AI: pip install 'pydantic-ai-slim[openai]'"""

from importlib.metadata import version

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from toolbox import FIRST, KEY, SECOND, URL, read_file, second_turn

print("pydantic-ai-slim", version("pydantic-ai-slim"))
model = OpenAIChatModel("scripted", provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY))
agent = Agent(model, tools=[read_file])
first = agent.run_sync(FIRST)
print(first.output)
second_turn()
print(agent.run_sync(SECOND, message_history=first.all_messages()).output)
