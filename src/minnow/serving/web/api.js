// What the page asks of the server. The browser sends the API key by itself, as the password of the page.

async function checked(response) {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // A proxy's own error page: the status has to do.
  }
  throw new Error(message);
}

export async function getJson(path) {
  return (await checked(await fetch(path))).json();
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal }).then(checked);
}

// The result of a built-in tool: text for the model. call: as the assistant wrote it.
export async function callTool(call, signal) {
  const { name, arguments: given } = call.function;
  return (await (await post("chat/tool", { name, arguments: given }, signal)).json()).content;
}

// Yield the chunks of a streamed answer.
export async function* streamChat(body, signal) {
  const response = await post("v1/chat/completions",
    { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  let rest = "";
  for await (const text of texts(response.body)) {
    const events = (rest + text).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const chunk = JSON.parse(event.slice("data: ".length));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function* texts(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let part; !(part = await reader.read()).done; ) yield part.value;
}

// Add what a chunk says to the assistant's message.
export function addDelta(message, delta) {
  if (delta.reasoning_content) message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
  if (delta.content) message.content += delta.content;
  for (const part of delta.tool_calls ?? []) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[part.index] ??= { id: part.id, type: "function", function: { name: "", arguments: "" } });
    call.function.name += part.function.name ?? "";
    call.function.arguments += part.function.arguments;
  }
}
