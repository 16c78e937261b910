# schemathesis against ROOT_URL, whose key is KEY: FOLDER/bin has it, FOLDER gets its logs.
# Several at once, each with some of the routes, so that the server works on several requests; one
# with several workers trips over itself in Python 3.11.
checks=not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance
checks=$checks,negative_data_rejection,ignored_auth
linked='^/v1/(responses|messages)' # what the stateful phase is for
parts="$linked ^/v1/chat ^/v1/completions ^/$ ^/generate$ ^/generate_stream$"

test_routes() { # name of the log, option and pattern
  case $3 in "$linked") phases=fuzzing,stateful ;; *) phases=fuzzing ;; esac
  "$folder/bin/schemathesis" run "$ROOT_URL/openapi.json" -H 'Authorization: Bearer KEY' \
    --checks $checks --phases examples,coverage,$phases --max-examples ${EXAMPLES:-25} \
    --seed ${SEED:-1} --generation-database none --request-timeout 120 "$2" "$3" >"$folder/$1.log" 2>&1
}

folder=$1 n=0 failed=0 pids=
test_routes rest --exclude-path-regex "$(echo "$parts" | tr ' ' '|')" & pids=$!
for part in $parts; do
  n=$((n + 1))
  test_routes "part$n" --include-path-regex "$part" & pids="$pids $!"
done
for pid in $pids; do wait "$pid" || failed=1; done
cat "$folder"/rest.log "$folder"/part?.log
exit $failed
