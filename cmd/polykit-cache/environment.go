package main

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// serviceLinks matches the environment variables that Kubernetes sets for Services whose names begin with
// polykit-cache, in pods beside them.
var serviceLinks = regexp.MustCompile(`^POLYKIT_CACHE(_.*)?(_SERVICE_HOST|_SERVICE_PORT(_.*)?|_PORT|_PORT_[0-9].*)$`)

// environmentWarnings returns what is odd about the environment variables of this program, each as NAME=VALUE: those
// that nothing reads. A server can't know whether they are meant for it, so they are no errors. Values are not told.
func environmentWarnings(environ []string) []string {
	const prefix = "POLYKIT_CACHE_"
	read := map[string]bool{
		prefix + "TOKEN": true, // by the client
		prefix + "URL":   true, // by nobody, but it is what jobs call the URL that they give to a client
	}
	for _, cmd := range withBelow(rootCommand()) {
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if hasEnvironment(f) {
				read[environmentName(f.Name)] = true
			}
		})
	}
	names := map[string]string{} // from what stands behind the prefix to the server's flag
	serverSettings().VisitAll(func(f *pflag.Flag) {
		if hasEnvironment(f) {
			names[strings.TrimPrefix(environmentName(f.Name), prefix)] = f.Name
		}
	})
	known := slices.Sorted(maps.Keys(names)) // of two that are as near always the same one is named
	var warnings []string
	for _, variable := range environ {
		name, value, _ := strings.Cut(variable, "=")
		rest, ours := strings.CutPrefix(name, prefix)
		switch {
		case !ours || value == "" || read[name] || strings.HasPrefix(rest, "TEST_"):
			continue
		case rest == "PORT" && !strings.Contains(value, "://"): // which is not what Kubernetes sets
			warnings = append(warnings, fmt.Sprintf("the environment variable %s is not read, since Kubernetes sets it to something else; --port is set by %s", name, environmentName("port")))
		case serviceLinks.MatchString(name):
			continue
		default:
			hint := "see --help for those that are"
			if near := nearest(rest, known); near != "" {
				hint = fmt.Sprintf("did you mean %s, which sets --%s?", prefix+near, names[near])
			}
			warnings = append(warnings, fmt.Sprintf("the environment variable %s is not read by any flag; %s", printable(name), hint))
		}
	}
	slices.Sort(warnings)
	return warnings
}
