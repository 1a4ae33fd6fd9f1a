// Command kubernetes checks what a kustomization makes, without a cluster: it must be of the very types that
// Kubernetes and the Prometheus operator have, with no field that they do not know, and its pods must be
// allowed where the restricted Pod Security Standard is enforced. It prints the objects as a JSON array.
//
// It is a module of its own, so that what it needs stays out of the program's go.mod, and no tool that there is,
// since those that check schemas without a cluster bring old ones.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	podsecurityapi "k8s.io/pod-security-admission/api"
	podsecurity "k8s.io/pod-security-admission/policy"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: kubernetes DIRECTORY")
		os.Exit(2)
	}
	if err := check(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func check(dir string) error {
	made, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		return err
	}
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		appsv1.AddToScheme, corev1.AddToScheme, networkingv1.AddToScheme, policyv1.AddToScheme, monitoringv1.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			return err
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	evaluator, err := podsecurity.NewEvaluator(podsecurity.DefaultChecks(), nil)
	if err != nil {
		return err
	}
	var errs []error
	objects := []any{}
	for _, resource := range made.Resources() {
		text, err := resource.AsYAML()
		if err != nil {
			return err
		}
		object, _, err := decoder.Decode(text, nil, nil)
		if err == nil {
			err = checkPods(evaluator, object)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", resource.GetKind(), resource.GetName(), err))
		}
		objects = append(objects, object)
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	return json.NewEncoder(os.Stdout).Encode(objects)
}

// checkPods checks that the pods of an object, if it makes any, are restricted.
func checkPods(evaluator podsecurity.Evaluator, object runtime.Object) error {
	var pod *corev1.PodTemplateSpec
	switch object := object.(type) {
	case *appsv1.StatefulSet:
		pod = &object.Spec.Template
	case *appsv1.Deployment:
		pod = &object.Spec.Template
	case *corev1.Namespace, *corev1.Service, *corev1.ConfigMap, *networkingv1.Ingress, *networkingv1.NetworkPolicy,
		*policyv1.PodDisruptionBudget, *monitoringv1.ServiceMonitor, *monitoringv1.PrometheusRule:
		return nil
	default:
		return fmt.Errorf("it is not known whether a %T makes pods; say so in checkPods", object)
	}
	restricted := podsecurityapi.LevelVersion{Level: podsecurityapi.LevelRestricted, Version: podsecurityapi.LatestVersion()}
	var errs []error
	for _, result := range evaluator.EvaluatePod(restricted, &metav1.ObjectMeta{Labels: pod.Labels, Annotations: pod.Annotations}, &pod.Spec) {
		if !result.Allowed {
			errs = append(errs, fmt.Errorf("not restricted: %s: %s", result.ForbiddenReason, result.ForbiddenDetail))
		}
	}
	return errors.Join(errs...)
}
