# Cline's command line: npm install cline
cline --version
cline auth --provider openai --apikey "$KEY" --modelid scripted --baseurl "$URL/v1"
cline -y "$FIRST"
second_turn
cline -y --continue "$SECOND"
