// ollama for Node: npm install ollama
import fs from 'fs';
import { createRequire } from 'module';
import { Ollama } from 'ollama';
const require = createRequire(import.meta.url);
const { URL: host, KEY, FIRST, SECOND } = process.env;
const root = require.resolve('ollama').replace(/ollama\/dist.*/, 'ollama/package.json');
console.log('ollama', JSON.parse(fs.readFileSync(root)).version);
const client = new Ollama({ host, headers: { Authorization: `Bearer ${KEY}` } });
const model = (await client.list()).models[0].model;
const parameters = { type: 'object', properties: { path: { type: 'string' } }, required: ['path'] };
const tools = [{ type: 'function', function: { name: 'read_file', description: 'Reads a file', parameters } }];
const messages = [{ role: 'user', content: FIRST }];
for (const question of [SECOND, null]) {
  for (;;) {
    const calls = [];
    let content = '';
    for await (const { message } of await client.chat({ model, messages, tools, stream: true })) {
      content += message.content ?? '';
      calls.push(...(message.tool_calls ?? []));
    }
    messages.push({ role: 'assistant', content, tool_calls: calls });
    if (!calls.length) { console.log(content); break; }
    for (const { function: { name, arguments: given } } of calls) {
      messages.push({ role: 'tool', tool_name: name, content: fs.readFileSync(given.path, 'utf8') });
    }
  }
  if (question) { messages.push({ role: 'user', content: question }); console.log('--- second turn'); }
}
