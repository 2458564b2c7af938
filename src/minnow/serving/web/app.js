// The web chat: a conversation in this tab, answered by the server's own OpenAI endpoint.
import { addDelta, callTool, getJson, streamChat } from "./api.js";
import { asJson, asMarkdown, conversation, download } from "./export.js";
import { element } from "./markdown.js";
import { TEXTS } from "./texts.js";
import { messageView } from "./view.js";

const MOST_ROUNDS = 8; // tool calls in a row before a model that only calls is stopped
const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];
const KEPT = ["model", "system", "thinking", "tools", ...NUMBERS]; // fields remembered in this browser

const $ = (id) => document.getElementById(id);
let language = localStorage.getItem("minnow.language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
let messages = JSON.parse(sessionStorage.getItem("minnow.messages") ?? "[]");
let tools = [];
let running = null; // the AbortController of the answer under way

const t = () => TEXTS[language];

function keep() {
  sessionStorage.setItem("minnow.messages", JSON.stringify(messages));
  const values = KEPT.map((id) => [id, $(id).type === "checkbox" ? $(id).checked : $(id).value]);
  localStorage.setItem("minnow.settings", JSON.stringify(Object.fromEntries(values)));
}

function restore() {
  const settings = JSON.parse(localStorage.getItem("minnow.settings") ?? "{}");
  for (const id of KEPT.filter((id) => id in settings)) {
    if (id === "model" && ![...$(id).options].some((option) => option.value === settings[id])) continue;
    $(id)[$(id).type === "checkbox" ? "checked" : "value"] = settings[id];
  }
}

// --- drawing ---

function drawTexts() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = t()[node.dataset.text];
  for (const node of document.querySelectorAll("[data-placeholder]")) {
    node.placeholder = node.ariaLabel = t()[node.dataset.placeholder];
  }
  for (const node of document.querySelectorAll("[data-label]")) node.ariaLabel = t()[node.dataset.label];
  $("language").textContent = language === "zh" ? "English" : "中文";
  $("language").lang = language === "zh" ? "en" : "zh";
}

const actions = {
  edit(message, text) {
    messages = messages.slice(0, messages.indexOf(message));
    messages.push({ role: "user", content: text });
    answer();
  },
  regenerate() {
    messages = messages.slice(0, messages.findLastIndex((message) => message.role === "user") + 1);
    answer();
  },
};

function show(message) {
  const view = messageView(message, t(), actions);
  $("messages").append(view.node);
  scrollDown(true);
  return view;
}

function drawMessages() {
  $("messages").replaceChildren();
  for (const message of messages) show(message);
  if (!messages.length) $("messages").append(element("p", { className: "hello", textContent: t().hello }));
}

function scrollDown(always) {
  const box = $("scroll");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
}

function setRunning(controller) {
  running = controller;
  document.body.classList.toggle("running", controller !== null);
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
}

// --- answering ---

const system = () => $("system").value.trim();

function request() {
  const body = { model: $("model").value, ...conversation(messages, system(), $("tools").checked ? tools : []) };
  for (const id of NUMBERS) if ($(id).value !== "") body[id] = Number($(id).value);
  if ($("thinking").checked) body.chat_template_kwargs = { enable_thinking: true };
  return body;
}

// Answer the conversation as it stands, with calls of tools in between.
async function answer() {
  running?.abort();
  const controller = new AbortController();
  setRunning(controller);
  drawMessages();
  try {
    for (let round = 1; ; round += 1) {
      const message = await writeMessage(controller.signal);
      if (message.finish === "tool_calls") await answerCalls(message, controller.signal);
      if (message.finish !== "tool_calls") break;
      if (round === MOST_ROUNDS) {
        message.finish = "rounds";
        break;
      }
    }
  } finally {
    if (running === controller) {
      setRunning(null);
      keep();
      drawMessages();
    }
  }
}

async function writeMessage(signal) {
  const body = request();
  const message = { role: "assistant", content: "" };
  messages.push(message);
  const view = show(message);
  let drawing = false;
  let first = 0;
  const draw = () => {
    drawing = false;
    view.update();
    scrollDown(false);
  };
  try {
    for await (const chunk of streamChat(body, signal)) {
      if (chunk.usage) message.tokens = chunk.usage.completion_tokens;
      const choice = chunk.choices[0];
      if (choice) {
        addDelta(message, choice.delta);
        message.finish = choice.finish_reason ?? message.finish;
        if (!first && (message.content || message.reasoning_content || message.tool_calls)) first = performance.now();
      }
      if (!drawing) {
        drawing = true;
        requestAnimationFrame(draw);
      }
    }
    const seconds = (performance.now() - first) / 1000;
    if (message.tokens > 1 && seconds > 0) message.rate = (message.tokens - 1) / seconds;
  } catch (error) {
    cutOff(message, error);
  } finally {
    message.finish ??= "error";
    draw();
  }
  return message;
}

// The answer ended before its time: the user stopped it, or the server failed.
function cutOff(message, error) {
  message.finish = error.name === "AbortError" ? "stopped" : "error";
  if (message.finish === "error") message.error = error.message;
  delete message.tool_calls; // a call without its result is none the model could be shown
}

// Have the tools called, and keep either all their results or none.
async function answerCalls(message, signal) {
  const results = [];
  try {
    for (const call of message.tool_calls) {
      const known = tools.some((tool) => tool.function.name === call.function.name);
      const content = known ? await callTool(call, signal) : JSON.stringify({ error: t().unknown });
      results.push({ role: "tool", tool_call_id: call.id, content });
      show(results.at(-1));
    }
    messages.push(...results);
  } catch (error) {
    cutOff(message, error);
  }
}

// --- the page ---

// The row for a file. A call belongs to its tools, also where they were turned off after it.
function exported() {
  const withTools = $("tools").checked || messages.some((message) => message.tool_calls);
  return conversation(messages, system(), withTools ? tools : []);
}

function send(event) {
  event?.preventDefault();
  const text = $("input").value;
  if (!text.trim() || running) return;
  $("input").value = "";
  grow();
  messages.push({ role: "user", content: text });
  answer();
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${Math.min($("input").scrollHeight + 2, 200)}px`;
}

function togglePanel() {
  const open = document.body.classList.toggle("panel-changed");
  $("toggle").ariaExpanded = String(open);
}

$("form").addEventListener("submit", send);
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  // Enter that picks a word in an input method (Chinese, Japanese) sends nothing.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  setRunning(null);
  messages = [];
  keep();
  drawMessages();
  $("input").focus();
});
$("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("minnow.language", language);
  drawTexts();
  if (!running) drawMessages();
});
$("toggle").addEventListener("click", togglePanel);
$("panel").addEventListener("change", keep);
$("model").addEventListener("change", keep);
$("json").addEventListener("click", () => download("conversation.json", asJson(exported()), "application/json"));
$("markdown").addEventListener("click", () => download("conversation.md", asMarkdown(exported()), "text/markdown"));

drawTexts();
try {
  const [models, offered] = await Promise.all([getJson("v1/models"), getJson("chat/tools")]);
  $("model").replaceChildren(...models.data.map(({ id }) => element("option", { value: id, textContent: id })));
  tools = offered.tools;
  $("tool-names").textContent = tools.map((tool) => tool.function.name).join(", ");
  restore();
  drawMessages();
} catch (error) {
  $("messages").append(element("p", { className: "error", textContent: t().error + error.message }));
}
