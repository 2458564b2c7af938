// Asks a GGUF file what it computes: `llama_probe MODEL.gguf f32|f16 CONTEXT`, then commands on stdin, a line each.
//   tokenize 0|1 HEX       ids of the UTF-8 text in HEX; 1: control tokens in the text are control tokens
//   logits ID ID ...       "N V", then N x V raw fp32: the logits after each token
//   greedy COUNT ID ID ... the ids that follow, ended by an end-of-generation token or COUNT
// Every command starts from an empty cache of the given number format.
#include "ggml-backend.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

static llama_context * ctx;

static void decode(const std::vector<llama_token> & ids, int from, bool all) {
    llama_batch batch = llama_batch_init((int) ids.size(), 0, 1);
    batch.n_tokens = (int) ids.size();
    for (int i = 0; i < batch.n_tokens; i++) {
        batch.token[i] = ids[i];
        batch.pos[i] = from + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = all || i + 1 == batch.n_tokens;
    }
    if (llama_decode(ctx, batch) != 0) {
        std::fprintf(stderr, "llama_decode failed\n");
        std::exit(1);
    }
    llama_batch_free(batch);
}

static std::vector<llama_token> rest(std::istringstream & line) {
    std::vector<llama_token> ids;
    for (llama_token id; line >> id;) ids.push_back(id);
    return ids;
}

static void print(const std::vector<llama_token> & ids) {
    for (llama_token id : ids) std::cout << id << ' ';
    std::cout << std::endl;
}

int main(int argc, char ** argv) {
    if (argc != 4) return 2;
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level >= GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
    }, nullptr);
    ggml_backend_load_all();  // in a build with backends in libraries of their own
    llama_model_params model_params = llama_model_default_params();
    model_params.use_extra_bufts = false;  // repacked weights crash on some CPUs with AMX
    model_params.progress_callback = [](float, void *) { return true; };  // the default one prints dots
    llama_model * model = llama_model_load_from_file(argv[1], model_params);
    if (!model) return 1;
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const int width = llama_vocab_n_tokens(vocab);

    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = std::atoi(argv[3]);
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = std::string(argv[2]) == "f32" ? GGML_TYPE_F32 : GGML_TYPE_F16;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    ctx = llama_init_from_model(model, params);
    if (!ctx) return 1;

    for (std::string text; std::getline(std::cin, text);) {
        std::istringstream line(text);
        std::string command;
        line >> command;
        llama_memory_clear(llama_get_memory(ctx), true);
        if (command == "tokenize") {
            bool special;
            std::string hex, bytes;
            line >> special >> hex;
            for (size_t i = 0; i + 1 < hex.size(); i += 2) bytes += (char) std::stoi(hex.substr(i, 2), nullptr, 16);
            std::vector<llama_token> ids(bytes.size() + 8);
            ids.resize(llama_tokenize(vocab, bytes.data(), (int) bytes.size(), ids.data(), (int) ids.size(), true, special));
            print(ids);
        } else if (command == "logits") {
            std::vector<llama_token> ids = rest(line);
            decode(ids, 0, true);
            std::cout << ids.size() << ' ' << width << std::endl;
            for (size_t i = 0; i < ids.size(); i++)
                std::cout.write((const char *) llama_get_logits_ith(ctx, (int) i), width * sizeof(float));
            std::cout.flush();
        } else if (command == "greedy") {
            int count;
            line >> count;
            std::vector<llama_token> ids = rest(line), out;
            int past = 0;
            while ((int) out.size() < count) {
                decode(ids, past, false);
                past += (int) ids.size();
                const float * logits = llama_get_logits_ith(ctx, -1);
                llama_token best = 0;
                for (llama_token id = 1; id < width; id++)
                    if (logits[id] > logits[best]) best = id;
                out.push_back(best);
                if (llama_vocab_is_eog(vocab, best)) break;
                ids = {best};
            }
            print(out);
        }
    }
    llama_free(ctx);
    llama_model_free(model);
}
