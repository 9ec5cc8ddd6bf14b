"""Questions about Loci itself, answered in a sentence or two, as its own documents put it."""

from __future__ import annotations

import random

Exchange = tuple[str, str]

# Each entry: ways to ask, and answers of which any one will do.
QUESTIONS = [
    (
        ["What is Loci?", "Tell me about Loci.", "What does Loci do?", "Explain Loci to me."],
        [
            (
                "Loci is a local inference server for mixture-of-experts models. It keeps every weight "
                "where it belongs: "
                "on the graphics card, in memory or on disk."
            ),
            "Loci runs large language models on your own machine and puts every weight in its place.",
        ],
    ),
    (
        ["Why is it called Loci?", "What does the name Loci mean?"],
        ["Loci is Latin for places. Loci gives every weight its place."],
    ),
    (
        ["What is a tier?", "What are tiers in Loci?", "Which tiers are there?"],
        [
            (
                "A tier is a place with a budget in bytes and a bandwidth: the memory of a graphics "
                "card, main memory, or disk."
            ),
            "Loci knows three kinds of tiers: video memory, main memory and disk.",
        ],
    ),
    (
        ["What is an expert?", "What is a routed expert?", "What are experts in a language model?"],
        [
            (
                "An expert is one of many small feed-forward networks of a layer. A router picks a few "
                "of them for every token."
            )
        ],
    ),
    (
        ["What is a mixture of experts?", "What is a mixture-of-experts model?", "What does MoE mean?"],
        [
            (
                "A mixture of experts is a model whose layers hold many experts, of which only a few "
                "work on each token."
            ),
            (
                "In a mixture of experts a router sends every token to a few experts, so most weights "
                "rest at any moment."
            ),
        ],
    ),
    (
        ["What is the router?", "What does a router do?", "How are experts chosen?"],
        ["The router scores all experts of a layer for a token and picks the best ones."],
    ),
    (
        ["What is Engram?", "What is an Engram table?", "How does Engram work?", "What are Engram rows?"],
        [
            (
                "Engram is a memory for short word sequences. The last few tokens are hashed, and the "
                "rows found there are read "
                "into the model."
            ),
            (
                "An Engram table holds rows for short sequences of tokens. Which rows are needed follows "
                "from the tokens alone, "
                "so they can be fetched early."
            ),
        ],
    ),
    (
        ["What is a hot expert?", "What are hot experts?"],
        ["A hot expert is one that the router picks often. Loci keeps hot experts on the fastest tier."],
    ),
    (
        ["What happens when an expert is not on the graphics card?", "What is a cache miss?"],
        ["Then Loci fetches it from main memory or disk, or computes it where it lies."],
    ),
    (
        ["What is a stall?", "What does stall time mean?"],
        ["A stall is time in which the computation waits for bytes. Loci measures it and tries to hide it."],
    ),
    (
        ["What is prefetching?", "What does prefetch mean?"],
        ["Prefetching means to fetch weights before they are needed, so that nobody has to wait for them."],
    ),
    (
        ["What is eviction?", "What does evicted mean?"],
        [
            (
                "Eviction means that something makes room: a weight that was not used for long leaves "
                "the fast tier."
            )
        ],
    ),
    (
        ["What is FP4?", "What does FP4 mean?"],
        [
            (
                "FP4 is a number format with four bits. Expert weights are stored in it, with one scale "
                "for 32 values."
            )
        ],
    ),
    (
        ["What is FP8?", "What does FP8 mean?"],
        ["FP8 is a number format with eight bits. Dense weights and Engram tables are stored in it."],
    ),
    (
        ["What is quantisation?", "What is quantization?", "Why are weights quantised?"],
        [
            "Quantisation stores weights with fewer bits. They take less space and are read faster.",
        ],
    ),
    (
        ["What is the KV cache?", "What is a KV cache for?"],
        ["The KV cache keeps keys and values of earlier tokens, so that they are not computed again."],
    ),
    (
        ["What is a token?", "What are tokens?"],
        ["A token is a piece of text, often a word or a part of one. Models read and write tokens."],
    ),
    (["What is a prompt?"], ["A prompt is the text that you give to a model."]),
    (
        ["What is a language model?", "How does a language model work?"],
        ["A language model predicts which token comes next. Repeated many times, this gives a text."],
    ),
    (
        ["What is the hidden state?", "What are residual streams?"],
        ["The residual streams carry what the model knows about a token from layer to layer."],
    ),
    (
        ["What is attention?", "What does attention do in a model?"],
        ["Attention lets a token look at earlier tokens and take from them what it needs."],
    ),
    (
        ["What is a sliding window?", "What is window attention?"],
        ["With a sliding window a token attends only to the tokens just before it."],
    ),
    (
        ["What is sparse attention?", "What does the indexer do?"],
        ["In sparse attention an indexer picks the few older entries that are worth reading."],
    ),
    (
        ["How do I start Loci?", "How can I start the server?", "How do I run Loci?"],
        [
            "Run make serve. The server then listens on 127.0.0.1, port 8000.",
            "Type loci serve, or make serve in a fresh copy of the project.",
        ],
    ),
    (
        ["How do I chat with a model?", "How can I chat in the terminal?"],
        ["Type loci chat. It streams the answers in your terminal."],
    ),
    (
        ["How do I see where the weights are?", "What does loci info do?"],
        ["Type loci info with the path of the model. It shows what the parts weigh and where they go."],
    ),
    (
        ["What does loci doctor do?", "How do I check my machine?"],
        ["loci doctor looks at your machine and says what is missing and what to do."],
    ),
    (
        [
            "Which interface does Loci have?",
            "Can I use the OpenAI library?",
            "Is Loci compatible with OpenAI?",
        ],
        ["Loci speaks the OpenAI protocol, so the usual client libraries work with it."],
    ),
    (
        ["Does Loci need a graphics card?", "Can Loci run without a GPU?"],
        ["No. Without a graphics card Loci computes on the processor."],
    ),
    (
        ["Does Loci send my data anywhere?", "Is Loci private?"],
        [
            (
                "No. Loci runs on your machine and listens on the local address only, unless you tell it "
                "otherwise."
            )
        ],
    ),
    (
        ["What is DeepSeek V4.1?", "Which models does Loci run?"],
        [
            (
                "DeepSeek V4.1 is a large mixture-of-experts model with Engram tables. Loci was built "
                "for models like it."
            )
        ],
    ),
    (
        ["What are hyper-connections?", "What is mHC?"],
        [
            (
                "Hyper-connections replace the single residual by several parallel streams that are "
                "mixed at every layer."
            )
        ],
    ),
    (["What is a shared expert?"], ["A shared expert works on every token, beside the routed ones."]),
    (
        ["Why are you so small?", "Why is the demo model small?"],
        ["I am small so that I fit into the project and answer at once on any computer."],
    ),
    (
        ["What is bandwidth?", "Why does bandwidth matter?"],
        ["Bandwidth is how many bytes can be moved in a second. It decides how fast a large model writes."],
    ),
    (
        ["What is a kernel?", "What are compute kernels?"],
        ["A kernel is a small program that does the heavy arithmetic."],
    ),
    (["What is a checkpoint?"], ["A checkpoint is the set of files that holds a model's weights."]),
]


def exchange(rng: random.Random) -> Exchange:
    """A question about Loci or the words it uses, and its answer."""
    ways, answers = rng.choice(QUESTIONS)
    question = rng.choice(ways)
    if rng.random() < 0.15:
        question = rng.choice(["Please tell me: {}", "I want to know: {}", "One more question: {}"]).format(
            question
        )
    return question, rng.choice(answers)
