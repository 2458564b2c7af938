// The web chat: a conversation in this tab, answered by the server's own OpenAI endpoint.
import { addDelta, callTool, getJson, streamChat } from "./api.js";
import { asJson, asMarkdown, conversation, download } from "./export.js";
import { element } from "./markdown.js";
import { contentOf, picturesOf } from "./pictures.js";
import { TEXTS } from "./texts.js";
import { pictureTray } from "./tray.js";
import { messageView } from "./view.js";

const MOST_ROUNDS = 8; // tool calls in a row before a model that only calls is stopped
const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];
const KEPT = ["model", "system", "thinking", "tools", ...NUMBERS]; // fields remembered in this browser

const $ = (id) => document.getElementById(id);
let language = [recall("localStorage", "minnow.language"), navigator.language.slice(0, 2), "en"].find((name) => name in TEXTS);
let messages = recall("sessionStorage", "minnow.messages") ?? [];
let tools = [];
let seeing = new Set(); // names of the models that look at pictures
let drawn = null; // the language that the messages are drawn in
let running = null; // the AbortController of the answer under way

const t = () => TEXTS[language];
const tray = pictureTray({ sees: () => seeing.has($("model").value), t, tell });

// A browser may forbid storage, have none left, or hold what is no JSON: the page then works without a memory.
function recall(storage, key) {
  try {
    return JSON.parse(window[storage].getItem(key));
  } catch {
    return null;
  }
}

function remember(storage, key, value) {
  try {
    window[storage].setItem(key, JSON.stringify(value));
  } catch {
    // see recall
  }
}

// Never between a call and its results: a reload would find a conversation that cannot go on.
function keepMessages() {
  remember("sessionStorage", "minnow.messages", messages);
}

function keepSettings() {
  const values = KEPT.map((id) => [id, $(id).type === "checkbox" ? $(id).checked : $(id).value]);
  remember("localStorage", "minnow.settings", Object.fromEntries(values));
}

function restore() {
  const settings = recall("localStorage", "minnow.settings") ?? {};
  for (const id of KEPT.filter((id) => id !== "model" && id in settings)) {
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
    drawMessages();
    ask(contentOf(text, picturesOf(message.content)));
    $("stop").focus(); // the button that was pressed is gone
  },
  regenerate() {
    messages = messages.slice(0, messages.findLastIndex((message) => message.role === "user") + 1);
    drawMessages();
    answer();
    $("stop").focus();
  },
};

function show(message) {
  const view = messageView(message, t(), actions);
  for (const node of $("messages").querySelectorAll(":scope > p")) node.remove(); // the greeting, an error before it
  $("messages").append(view.node);
  scrollDown(true);
  return view;
}

function drawMessages() {
  drawn = language;
  $("messages").replaceChildren();
  for (const message of messages) show(message);
  if (!messages.length) $("messages").append(element("p", { className: "hello", textContent: t().hello }));
}

function scrollDown(always) {
  const box = $("scroll");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
}

function setRunning(controller) {
  const focused = [$("send"), $("stop")].includes(document.activeElement);
  running = controller;
  document.body.classList.toggle("running", controller !== null);
  $("messages").ariaBusy = String(controller !== null); // read out once it is whole
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
  if (focused) $(controller ? "stop" : "input").focus(); // a hidden button would lose it
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
  keepMessages();
  try {
    for (let round = 1; ; round += 1) {
      const { message, view } = await writeMessage(controller.signal);
      if (message.finish === "tool_calls") await answerCalls(message, controller.signal);
      if (message.finish === "tool_calls" && round === MOST_ROUNDS) message.finish = "rounds";
      view.update();
      if (message.finish !== "tool_calls") break;
    }
  } finally {
    if (running === controller) {
      setRunning(null);
      keepMessages();
      if (drawn !== language) drawMessages();
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
    if (!message.finish) throw new Error(t().broken);
    if (message.finish !== "tool_calls") delete message.tool_calls; // cut off at the longest length
    const seconds = (performance.now() - first) / 1000;
    if (first && message.tokens > 1 && seconds > 0) message.rate = (message.tokens - 1) / seconds;
  } catch (error) {
    cutOff(message, error);
  }
  draw();
  return { message, view };
}

// The answer ended before its time: the user stopped it, or the server failed.
function cutOff(message, error) {
  message.finish = error.name === "AbortError" ? "stopped" : "error";
  delete message.tool_calls; // a call without its result is none the model could be shown
  if (message.finish !== "error") return;
  message.error = error.message;
  load().catch(() => {}); // the server may have been started again, with other models
}

// Have the tools called, and keep either all their results or none.
async function answerCalls(message, signal) {
  const results = [];
  const views = [];
  try {
    for (const call of message.tool_calls) {
      const known = tools.some((tool) => tool.function.name === call.function.name);
      const content = known ? await callTool(call, signal) : JSON.stringify({ error: t().unknown });
      results.push({ role: "tool", tool_call_id: call.id, content });
      views.push(show(results.at(-1)));
    }
    messages.push(...results);
  } catch (error) {
    for (const view of views) view.node.remove();
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
  if (running || !(text.trim() || tray.holds())) return;
  $("input").value = "";
  grow();
  ask(contentOf(text, tray.empty()));
}

function ask(content) {
  const message = { role: "user", content };
  messages.push(message);
  show(message);
  answer();
}

function tell(error) {
  $("messages").append(element("p", { className: "error", textContent: t().error + error }));
  scrollDown(true);
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${Math.min($("input").scrollHeight + 2, 200)}px`;
}

// Wide screens show the panel until it is closed, narrow ones once it is opened.
function drawToggle() {
  $("toggle").ariaExpanded = String(getComputedStyle($("panel")).display !== "none");
}

// What the server has: its models, the chosen one chosen again, and its tools.
async function load() {
  const [models, offered] = await Promise.all([getJson("v1/models"), getJson("chat/tools")]);
  const chosen = $("model").value || recall("localStorage", "minnow.settings")?.model;
  $("model").replaceChildren(...models.data.map(({ id }) => element("option", { value: id, textContent: id })));
  if (models.data.some(({ id }) => id === chosen)) $("model").value = chosen;
  const sees = ({ architecture }) => architecture?.input_modalities.includes("image");
  seeing = new Set(models.data.filter(sees).map(({ id }) => id));
  tray.draw();
  tools = offered.tools;
  $("tool-names").textContent = tools.map((tool) => tool.function.name).join(", ");
}

$("form").addEventListener("submit", send);
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  // Enter that picks a word in an input method (Chinese, Japanese) sends nothing. Safari says that only by the code 229.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) send(event);
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  setRunning(null);
  messages = [];
  tray.empty();
  keepMessages();
  drawMessages();
  $("input").focus();
});
$("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  remember("localStorage", "minnow.language", language);
  drawTexts();
  tray.draw();
  if (!running) drawMessages();
});
$("toggle").addEventListener("click", () => {
  document.body.classList.toggle("panel-changed");
  drawToggle();
});
addEventListener("resize", drawToggle);
$("panel").addEventListener("change", keepSettings);
$("model").addEventListener("change", () => {
  keepSettings();
  tray.draw();
});
$("json").addEventListener("click", () => download("conversation.json", asJson(exported()), "application/json"));
$("markdown").addEventListener("click", () => download("conversation.md", asMarkdown(exported()), "text/markdown"));

drawTexts();
drawToggle();
restore();
drawMessages();
try {
  await load();
} catch (error) {
  tell(error.message);
}
