# Cline's command line: npm install cline
cline --version
cline auth --provider openai --apikey "$KEY" --modelid scripted --baseurl "$URL/v1" 1>&2
cline "$FIRST"
second_turn
cline --id "$(cline history --json | grep -o '"sessionId": *"[^"]*"' | head -n 1 | cut -d '"' -f 4)" "$SECOND"
