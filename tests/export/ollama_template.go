// Renders a chat template the way ollama does: stdin holds {"template", "messages", "tools", "think"} a line, stdout the
// rendered texts as JSON strings. What ollama does to messages before (joining neighbours of one role) is done here too.
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type object struct{ value any }

func (o object) String() string { b, _ := json.Marshal(o.value); return string(b) }

func (o *object) UnmarshalJSON(data []byte) error { return json.Unmarshal(data, &o.value) }

type function struct {
	Name      string `json:"name"`
	Arguments object `json:"arguments"`
}

type call struct {
	Function function `json:"function"`
}

type message struct {
	Role      string `json:"role"`
	Content   string `json:"content"`
	Thinking  string `json:"thinking"`
	ToolCalls []call `json:"tool_calls"`
}

type request struct {
	Template string     `json:"template"`
	Messages []*message `json:"messages"`
	Tools    []object   `json:"tools"`
	Think    bool       `json:"think"`
}

func joined(messages []*message) (string, []*message) {
	var system []string
	var out []*message
	for _, m := range messages {
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(out); n > 0 && out[n-1].Role == m.Role && m.Role != "tool" {
			out[n-1].Content += "\n\n" + m.Content
		} else {
			out = append(out, m)
		}
	}
	return strings.Join(system, "\n\n"), out
}

func main() {
	functions := template.FuncMap{"json": func(v any) string { b, _ := json.Marshal(v); return string(b) }}
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<24)
	for in.Scan() {
		var r request
		if err := json.Unmarshal(in.Bytes(), &r); err != nil {
			panic(err)
		}
		system, messages := joined(r.Messages)
		t := template.Must(template.New("").Option("missingkey=zero").Funcs(functions).Parse(r.Template))
		var text strings.Builder
		err := t.Execute(&text, map[string]any{
			"System": system, "Messages": messages, "Tools": r.Tools, "Response": "", "Think": r.Think, "IsThinkSet": true,
		})
		if err != nil {
			panic(err)
		}
		line, _ := json.Marshal(text.String())
		os.Stdout.Write(append(line, '\n'))
	}
}
