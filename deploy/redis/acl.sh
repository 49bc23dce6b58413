#!/bin/sh
# users.acl with passwords: each user USER whose variable DGPO_QUEUE_PASSWORD_USER is set (worker:
# DGPO_QUEUE_PASSWORD_WORKER) gets its SHA-256; `run` also takes DGPO_QUEUE_PASSWORD. The others cannot log in.
#
#   (umask 077; deploy/redis/acl.sh deploy/redis/users.acl > /etc/dgpo-queue/users.acl)
#
# POSIX sh, for the small images that Valkey and Redis come in. No password is on a command line or in the output.
set -eu

[ $# -eq 1 ] || { echo "usage: acl.sh USERS_ACL > RENDERED" >&2; exit 2; }
[ -r "$1" ] || { echo "acl.sh: cannot read $1" >&2; exit 2; }

given=0
while read -r word user rest; do
  [ "$word" = user ] || { echo "acl.sh: $1: a line does not begin with 'user'" >&2; exit 2; }
  name=DGPO_QUEUE_PASSWORD_$(printf %s "$user" | tr '[:lower:]' '[:upper:]')
  eval "password=\${$name:-}"
  # shellcheck disable=SC2154
  if [ -z "$password" ] && [ "$user" = run ]; then password=${DGPO_QUEUE_PASSWORD:-}; fi
  if [ "$user" = default ] || [ -z "$password" ]; then
    printf 'user %s %s\n' "$user" "$rest"
    continue
  fi
  if [ "${#password}" -lt 16 ]; then
    echo "acl.sh: $name: a password of at least 16 characters is needed, for example of: openssl rand -hex 32" >&2
    exit 2
  fi
  hash=$(printf %s "$password" | sha256sum | cut -d ' ' -f 1)
  # Behind `reset`, which would take it away again.
  printf 'user %s reset #%s %s\n' "$user" "$hash" "${rest#reset }"
  given=$((given + 1))
done < "$1"

if [ "$given" -eq 0 ]; then
  echo "acl.sh: no password was given: set DGPO_QUEUE_PASSWORD, or DGPO_QUEUE_PASSWORD_WORKER and so on" >&2
  exit 2
fi
