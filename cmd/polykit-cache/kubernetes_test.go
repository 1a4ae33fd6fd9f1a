//go:build unix

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v4"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// This file checks deploy/kubernetes: that a cluster would take it, and that it fits the server.

const manifests = "../../deploy/kubernetes"

// manifest is what the tests look at of an object of Kubernetes.
type manifest struct {
	Kind     string
	Metadata struct {
		Name        string
		Labels      map[string]string
		Annotations map[string]string
	}
	Data map[string]string
	Spec struct {
		ServiceName          string
		Selector             json.RawMessage // labels, or an object that has them
		PodSelector          labelSelector
		Template             podTemplate
		Ports                []servicePort
		Endpoints            []servicePort
		Rules                []ingressRule
		Ingress, Egress      []policyRule
		VolumeClaimTemplates []manifest
	}
}

type (
	labelSelector struct{ MatchLabels map[string]string }
	servicePort   struct {
		Name, Port, TargetPort any
	}
	policyRule  struct{ Ports []servicePort }
	ingressRule struct {
		HTTP struct {
			Paths []struct {
				Path    string
				Backend struct {
					Service struct {
						Name string
						Port servicePort
					}
				}
			}
		}
	}
	podTemplate struct {
		Metadata struct{ Labels map[string]string }
		Spec     struct {
			Containers                    []container
			EnableServiceLinks            *bool
			AutomountServiceAccountToken  *bool
			TerminationGracePeriodSeconds int
			Volumes                       []struct {
				Name      string
				ConfigMap struct{ Name string }
			}
		}
	}
	container struct {
		Args  []string
		Env   []struct{ Name, Value string }
		Ports []struct {
			Name          string
			ContainerPort int
		}
		StartupProbe, LivenessProbe, ReadinessProbe probe
		Resources                                   struct{ Limits map[string]string }
		VolumeMounts                                []struct{ Name, MountPath, SubPath string }
	}
	probe struct {
		HTTPGet struct{ Path, Port string }
	}
)

// flags returns the values of the flags that a container gives the server.
func (c *container) flags(t *testing.T) map[string]string {
	t.Helper()
	given := map[string]string{}
	for _, arg := range c.Args {
		name, value, ok := strings.Cut(arg, "=")
		if !ok || !strings.HasPrefix(name, "--") {
			t.Errorf("the argument %q is not --flag=value", arg)
		}
		given[strings.TrimPrefix(name, "--")] = value
	}
	return given
}

func (c *container) port(name string) int {
	for _, port := range c.Ports {
		if port.Name == name {
			return port.ContainerPort
		}
	}
	return 0
}

// checkKubernetes runs the program that checks what a kustomization makes, as it is or with an edit of one
// of its files.
func checkKubernetes(t *testing.T, file string, pairs ...string) ([]manifest, error) {
	t.Helper()
	program, err := exec.LookPath("kubernetes-check")
	if err != nil {
		skip(t, "kubernetes-check is not there; build it: go build -C .tools/kubernetes -o kubernetes-check . and have it in PATH")
	}
	dir := t.TempDir()
	check(t, os.CopyFS(dir, os.DirFS(manifests)))
	if file != "" {
		text, err := os.ReadFile(filepath.Join(dir, file))
		check(t, err)
		check(t, os.WriteFile(filepath.Join(dir, file), []byte(edit(t, string(text), pairs...)), 0o600))
	}
	var stderr bytes.Buffer
	command := exec.Command(program, dir)
	command.Stderr = &stderr
	output, err := command.Output()
	if err != nil {
		return nil, errors.New(stderr.String())
	}
	var made []manifest
	check(t, json.Unmarshal(output, &made))
	return made, nil
}

// edit replaces what a configuration must have, or the test would not know that it does not.
func edit(t *testing.T, text string, pairs ...string) string {
	t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(text, pairs[i]) {
			t.Fatalf("the configuration has no %q", pairs[i])
		}
	}
	return strings.NewReplacer(pairs...).Replace(text)
}

// monitored takes the comment signs from the component monitoring.
var monitored = []string{"# components:\n#   - monitoring", "components:\n  - monitoring"}

// TestKubernetes checks that Kubernetes knows every field, that the pod is restricted, and that what refers
// to each other does.
func TestKubernetes(t *testing.T) {
	t.Parallel()
	for name, pairs := range map[string][]string{"alone": nil, "monitored": monitored} {
		t.Run(name, func(t *testing.T) {
			made, err := checkKubernetes(t, "kustomization.yaml", pairs...)
			check(t, err)
			kinds := map[string][]manifest{}
			for _, m := range made {
				kinds[m.Kind] = append(kinds[m.Kind], m)
			}
			want := []string{"ConfigMap", "Ingress", "Namespace", "NetworkPolicy", "PodDisruptionBudget", "Service", "StatefulSet"}
			if pairs != nil {
				want = append(want, "ServiceMonitor")
			}
			for _, kind := range want {
				if len(kinds[kind]) == 0 {
					t.Fatalf("there is no %s", kind)
				}
			}
			set, service := kinds["StatefulSet"][0], kinds["Service"][0]
			pod := set.Spec.Template
			server := &pod.Spec.Containers[0]

			// Labels.
			for _, m := range made {
				var labels map[string]string
				var selector labelSelector
				switch m.Kind {
				case "Service":
					check(t, json.Unmarshal(m.Spec.Selector, &labels))
				case "StatefulSet", "PodDisruptionBudget":
					check(t, json.Unmarshal(m.Spec.Selector, &selector))
					labels = selector.MatchLabels
				case "NetworkPolicy":
					labels = m.Spec.PodSelector.MatchLabels
				case "ServiceMonitor":
					check(t, json.Unmarshal(m.Spec.Selector, &selector))
					if !includes(service.Metadata.Labels, selector.MatchLabels) {
						t.Errorf("%s selects %v, not the Service", m.Kind, selector.MatchLabels)
					}
					continue
				default:
					continue
				}
				if !includes(pod.Metadata.Labels, labels) {
					t.Errorf("%s selects %v, not the pod", m.Kind, labels)
				}
			}

			// Ports, by name.
			if set.Spec.ServiceName != service.Metadata.Name {
				t.Errorf("the StatefulSet names the Service %q", set.Spec.ServiceName)
			}
			named := map[any]bool{}
			for _, port := range service.Spec.Ports {
				named[port.Name] = true
				if target, _ := port.TargetPort.(string); float64(server.port(target)) != port.Port {
					t.Errorf("the Service's port %v leads from %v to %v, which is %d", port.Name, port.Port, port.TargetPort, server.port(target))
				}
			}
			for _, rule := range kinds["NetworkPolicy"][0].Spec.Ingress {
				for _, port := range rule.Ports {
					if name, _ := port.Port.(string); server.port(name) == 0 {
						t.Errorf("the NetworkPolicy lets in to the port %v, which there is not", port.Port)
					}
				}
			}
			for _, m := range kinds["ServiceMonitor"] {
				for _, endpoint := range m.Spec.Endpoints {
					if !named[endpoint.Port] || endpoint.Port == "http" {
						t.Errorf("the ServiceMonitor asks at the port %v", endpoint.Port)
					}
				}
			}
			paths := map[string]string{} // and to which protocol they lead
			for _, m := range kinds["Ingress"] {
				for _, rule := range m.Spec.Rules {
					for _, p := range rule.HTTP.Paths {
						paths[p.Path] = m.Metadata.Annotations["nginx.ingress.kubernetes.io/backend-protocol"]
						if to := p.Backend.Service; to.Name != service.Metadata.Name || to.Port.Name != "http" {
							t.Errorf("the Ingress leads %s to %s:%v", p.Path, to.Name, to.Port.Name)
						}
					}
				}
			}
			for _, grpc := range []string{cachev1.ArtifactService_ServiceDesc.ServiceName, healthpb.Health_ServiceDesc.ServiceName, reflectionpb.ServerReflection_ServiceDesc.ServiceName} {
				if paths["/"+grpc] != "GRPC" {
					t.Errorf("no Ingress leads %s to gRPC", grpc)
				}
			}
			if protocol, ok := paths["/"]; !ok || protocol != "" || len(paths) != 4 {
				t.Errorf("the Ingresses lead %v", paths)
			}

			// The auth file, in a directory, so that the server sees it change.
			file := server.flags(t)["auth-file"]
			volume := ""
			for _, mount := range server.VolumeMounts {
				if mount.MountPath == path.Dir(file) && mount.SubPath == "" {
					volume = mount.Name
				}
			}
			for _, v := range pod.Spec.Volumes {
				if v.Name == volume && v.ConfigMap.Name != kinds["ConfigMap"][0].Metadata.Name {
					t.Errorf("the volume %s is of the ConfigMap %q", v.Name, v.ConfigMap.Name)
				}
			}
			if volume == "" || kinds["ConfigMap"][0].Data[path.Base(file)] == "" {
				t.Errorf("no ConfigMap brings %s", file)
			}

			// Flags that there are, and the port of the one for operators.
			flags := rootCommand().Flags()
			for name, value := range server.flags(t) {
				if name == "admin-address" && value != "0.0.0.0:"+strconv.Itoa(server.port("admin")) {
					t.Errorf("--admin-address is %s, and the port %d", value, server.port("admin"))
				}
				if flag := flags.Lookup(name); flag == nil {
					t.Errorf("the server has no --%s", name)
				}
			}
		})
	}
}

// includes says whether all of some labels are among others, and that there are some.
func includes(labels, some map[string]string) bool {
	for name, value := range some {
		if labels[name] != value {
			return false
		}
	}
	return len(some) > 0
}

// TestKubernetesMistakes makes mistakes, of which each must be found.
func TestKubernetesMistakes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ file, old, new, want string }{
		{"statefulset.yaml", "readinessProbe:", "readynessProbe:", `unknown field "spec.template.spec.containers[0].readynessProbe"`},
		{"statefulset.yaml", "replicas: 1", "replicas: one", "replicas"},
		{"statefulset.yaml", "allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true", "not restricted: allowPrivilegeEscalation"},
		{"statefulset.yaml", "drop: [ALL]", "drop: [NET_RAW]", "not restricted: unrestricted capabilities"},
		{"statefulset.yaml", "runAsNonRoot: true", "runAsNonRoot: false", "not restricted: runAsNonRoot"},
		{"statefulset.yaml", "type: RuntimeDefault", "type: Unconfined", "not restricted: seccompProfile"},
		{"statefulset.yaml", "apiVersion: apps/v1", "apiVersion: apps/v2", `no kind "StatefulSet" is registered for version "apps/v2"`},
		{"ingress.yaml", "pathType: Prefix", "pathTyp: Prefix", "pathTyp"},
		{"networkpolicy.yaml", "policyTypes:", "policyType:", `unknown field "spec.policyType"`},
		{"kustomization.yaml", "  - service.yaml", "  - services.yaml", "services.yaml"},
		{"kustomization.yaml", "namespace: polykit-cache", "namespaces: polykit-cache", "namespaces"},
	} {
		t.Run(c.new, func(t *testing.T) {
			if _, err := checkKubernetes(t, c.file, c.old, c.new); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
}

// TestKubernetesServer starts the server with exactly what the StatefulSet gives it, but for its directories
// and addresses, and asks it what the kubelet would.
func TestKubernetesServer(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join(manifests, "statefulset.yaml"))
	check(t, err)
	var loose any
	check(t, yaml.Unmarshal(text, &loose))
	asJSON, err := json.Marshal(loose)
	check(t, err)
	var set manifest
	check(t, json.Unmarshal(asJSON, &set))
	pod := set.Spec.Template.Spec
	c := &pod.Containers[0]

	given := c.flags(t)
	mounts := func(dir string) bool {
		return slices.ContainsFunc(c.VolumeMounts, func(m struct{ Name, MountPath, SubPath string }) bool { return m.MountPath == dir })
	}
	if given["bind"] != "0.0.0.0" || !mounts(given["storage-dir"]) {
		t.Errorf("the server listens on %q and stores in %q, where no volume is", given["bind"], given["storage-dir"])
	}
	flags := rootCommand().Flags()
	if port := valueOf(given, flags, "port"); port != strconv.Itoa(c.port("http")) {
		t.Errorf("the server listens on port %s, and the pod says %d", port, c.port("http"))
	}
	shutdown, err := time.ParseDuration(valueOf(given, flags, "shutdown-timeout"))
	check(t, err)
	if grace := time.Duration(pod.TerminationGracePeriodSeconds) * time.Second; grace < shutdown+10*time.Second {
		t.Errorf("the server gets %v to end, and gives requests %v", grace, shutdown)
	}
	if pod.EnableServiceLinks == nil || *pod.EnableServiceLinks || pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken {
		t.Error("the pod gets variables of Services, or a token of Kubernetes")
	}
	var limit sizeFlag
	check(t, limit.Set(c.Resources.Limits["memory"]+"B"))
	if limit < 1<<30 { // for verifying at most half of it
		t.Errorf("the memory limit is %s", limit.String())
	}

	// As the kubelet lays out a ConfigMap: it replaces ..data when that changes.
	volume := t.TempDir()
	policy, err := os.ReadFile(filepath.Join(manifests, "auth.yaml"))
	check(t, err)
	bring := func(version string, policy []byte) {
		next := filepath.Join(volume, "..data_tmp")
		check(t, os.Mkdir(filepath.Join(volume, version), 0o700), os.WriteFile(filepath.Join(volume, version, "auth.yaml"), policy, 0o600),
			os.Symlink(version, next), os.Rename(next, filepath.Join(volume, "..data")))
	}
	bring("..1", policy)
	check(t, os.Symlink("..data/auth.yaml", filepath.Join(volume, "auth.yaml")))

	dir := t.TempDir()
	args := slices.Clone(c.Args)
	for i, arg := range args {
		switch name, value, _ := strings.Cut(arg, "="); name {
		case "--bind":
			args[i] = "--bind=127.0.0.1"
		case "--storage-dir":
			args[i] = "--storage-dir=" + dir
		case "--auth-file":
			args[i] = "--auth-file=" + filepath.Join(volume, path.Base(value))
		}
	}
	env := []string{"GORACE=atexit_sleep_ms=0", "TMPDIR=/nonexistent", "PATH=" + os.Getenv("PATH")} // for nothing else can be written to
	for _, e := range c.Env {
		env = append(env, e.Name+"="+e.Value)
	}
	p, err := spawn("polykit-cache", env, args...)
	check(t, err)
	p.started(t)
	for name, probe := range map[string]probe{"startup": c.StartupProbe, "liveness": c.LivenessProbe, "readiness": c.ReadinessProbe} {
		response, err := http.Get("http://" + p.address + probe.HTTPGet.Path)
		check(t, err)
		response.Body.Close()
		if response.StatusCode != 200 || probe.HTTPGet.Port != "http" {
			t.Errorf("%s probe: %s at port %s: %s", name, probe.HTTPGet.Path, probe.HTTPGet.Port, response.Status)
		}
	}
	if c.LivenessProbe.HTTPGet.Path != "/healthz" || c.ReadinessProbe.HTTPGet.Path != "/readyz" {
		t.Error("liveness must not depend on the volume, and readiness must")
	}

	put := func() int {
		key := cachetest.Key("a")
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+p.address+"/v1/artifacts/"+key.String(), bytes.NewReader(cachetest.Sound(key, nil)))
		check(t, err)
		response, err := http.DefaultClient.Do(request)
		check(t, err)
		response.Body.Close()
		return response.StatusCode
	}
	if status := put(); status != 401 {
		t.Errorf("an upload of somebody gets %d, before anybody may", status)
	}
	bring("..2", bytes.Replace(policy, []byte("role: reader"), []byte("role: writer"), 1))
	waitUntil(t, "the server has read the changed auth file", func() bool { return put() != 401 })
	if _, err := os.Stat(filepath.Join(dir, cachetest.Key("a").String()[:2])); errors.Is(err, fs.ErrNotExist) {
		t.Error("nothing is stored")
	}
}

// valueOf returns the value of a flag that is given, or else its default.
func valueOf(given map[string]string, flags *pflag.FlagSet, name string) string {
	if value, ok := given[name]; ok {
		return value
	}
	return flags.Lookup(name).DefValue
}
