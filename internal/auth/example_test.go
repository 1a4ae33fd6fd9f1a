package auth_test

import (
	"testing"

	"github.com/polykit/polykit-cache/internal/auth"
)

// The example file is right, and decides what its comments say.
func TestExampleFile(t *testing.T) {
	p, err := auth.Load("../../deploy/auth.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, claims, want string }{
		{"push to main", `{"repository_owner": "octo", "repository_id": "9", "ref": "refs/heads/main", "event_name": "push"}`, `writer as rule "github main" in default reads default`},
		{"pull request", `{"repository_owner": "octo", "repository_id": "9", "ref": "refs/pull/7/merge", "event_name": "pull_request"}`, `writer as rule "github pull requests" in pr-9-7 reads pr-9-7 default`},
		{"pull_request_target", `{"repository_owner": "octo", "repository_id": "9", "ref": "refs/heads/main", "event_name": "pull_request_target"}`, "no_rule"},
		{"push to a branch", `{"repository_owner": "octo", "repository_id": "9", "ref": "refs/heads/x", "event_name": "push"}`, "no_rule"},
		{"another owner", `{"repository_owner": "evil", "repository_id": "9", "ref": "refs/heads/main", "event_name": "push"}`, "no_rule"},
	} {
		if got := outcome(p.Explain(claims(t, c.claims), "", auth.Write)); got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
	}
	for _, c := range []struct{ name, claims, want string }{
		{"protected", `{"namespace_path": "octo", "ref_protected": "true", "pipeline_source": "push", "user_id": "42"}`, `writer as rule "gitlab protected branches" in default reads default`},
		{"not protected", `{"namespace_path": "octo", "ref_protected": "false", "pipeline_source": "push", "user_id": "42"}`, `writer as rule "gitlab others" in user-42 reads user-42 default`},
		{"merge request", `{"namespace_path": "octo", "ref_protected": "true", "pipeline_source": "merge_request_event", "user_id": "42"}`, `writer as rule "gitlab others" in user-42 reads user-42 default`},
	} {
		gitlab := claims(t, c.claims)
		gitlab.Issuer = "gitlab"
		if got := outcome(p.Explain(gitlab, "", auth.Write)); got != c.want {
			t.Errorf("GitLab, %s: got %s, want %s", c.name, got, c.want)
		}
	}
}
