// What the page says, in English and Chinese.
export const TEXTS = {
  en: {
    model: "Model", clear: "New chat", settings: "Settings", ask: "Write a message", picture: "Picture", remove: "Remove",
    no_picture: " is no picture that can be shown.", send: "Send", stop: "Stop",
    system: "System prompt", think: "Think before answering", tools: "Use tools:", temperature: "Temperature",
    top_p: "Top p", top_k: "Top k", repetition_penalty: "Repetition penalty", max_tokens: "Longest answer, in tokens",
    seed: "Seed", empty: "An empty field leaves the choice to the server.", save_json: "Save as JSON",
    save_markdown: "Save as Markdown", user: "You", thoughts: "Thoughts", thinking: "Thinking …", copy: "Copy",
    copied: "Copied", edit: "Edit", regenerate: "Regenerate", save: "Send again", cancel: "Cancel", call: "Call",
    rate: "tokens/s", tokens: "tokens", length: "cut off at the longest length", stopped: "stopped",
    error: "This did not work: ", rounds: "stopped after many tool calls in a row",
    broken: "the connection ended in the middle of the answer.", result: "Result",
    unknown: "There is no such tool here.", hello: "What shall we talk about?",
  },
  zh: {
    model: "模型", clear: "新对话", settings: "设置", ask: "输入消息", picture: "图片", remove: "移除",
    no_picture: " 不是可以显示的图片。", send: "发送", stop: "停止",
    system: "系统提示词", think: "先思考再回答", tools: "使用工具：", temperature: "温度",
    top_p: "Top p", top_k: "Top k", repetition_penalty: "重复惩罚", max_tokens: "回答的最大长度（词元）",
    seed: "随机种子", empty: "留空则由服务器决定。", save_json: "导出 JSON",
    save_markdown: "导出 Markdown", user: "你", thoughts: "思考过程", thinking: "思考中……", copy: "复制",
    copied: "已复制", edit: "编辑", regenerate: "重新生成", save: "重新发送", cancel: "取消", call: "调用",
    rate: "词元/秒", tokens: "词元", length: "达到最大长度，已截断", stopped: "已停止",
    error: "出错了：", rounds: "连续调用工具次数过多，已停止",
    broken: "回答中途连接断开。", result: "结果",
    unknown: "没有这个工具。", hello: "想聊点什么？",
  },
};
